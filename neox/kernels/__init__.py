"""Our own kernels for decoding on a CPU, in C++: built when they are first needed."""
