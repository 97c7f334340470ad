"""Files that hold weights: on the hub, in folders, quantised for llama.cpp, packed."""
