"""What a result is a result of: data sets, imports, and whether they changed."""
