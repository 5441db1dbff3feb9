"""Text from files and hubs, as documents, windows and batches."""
