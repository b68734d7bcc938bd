"""L4: nn.Module to records and back. The only code that touches modules."""
