"""Models written to be read: plain, slow and obviously right."""
