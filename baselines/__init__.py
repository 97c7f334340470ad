"""The methods that are not ALPS, one file each; conf/method names their classes."""
