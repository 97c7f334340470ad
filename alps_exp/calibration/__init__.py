"""What is collected of the layers' inputs, with too little memory too, and shared between runs."""
