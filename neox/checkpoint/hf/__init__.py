"""Models in the format of the transformers library: read as a checkpoint, exported and imported.

files      TransformersFiles, the source behind Checkpoint
eight_bit  weights of 8 bits among a folder's tensors
names      what the classes that are read call our tensors
tensors    which tensor of transformers is made of which of ours
export     a checkpoint to a folder
proof      that the folder computes what the checkpoint does; the one user of transformers
importing  a folder to a checkpoint
"""
