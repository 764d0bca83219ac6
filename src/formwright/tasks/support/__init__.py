"""What several tasks share: reading files, tokenizing text, scoring cells."""
