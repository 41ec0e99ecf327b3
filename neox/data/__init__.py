"""Training data: tokenized files, the order of samples, micro-batches; and making such files."""
