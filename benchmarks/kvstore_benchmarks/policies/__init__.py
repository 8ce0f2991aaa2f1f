"""Pictures of what policies hold of traces."""
