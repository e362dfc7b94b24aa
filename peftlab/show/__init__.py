"""What people read on the page: tables, sentences and code as HTML or text, each a pure function of results."""
