"""Vision towers of other libraries, in and out."""
