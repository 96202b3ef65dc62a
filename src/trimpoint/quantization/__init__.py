"""Number formats: which range a tensor is given, and which numbers its values become."""
