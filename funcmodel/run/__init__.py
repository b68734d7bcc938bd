"""L3: files, bytes, tensors. The only code that performs I/O."""
