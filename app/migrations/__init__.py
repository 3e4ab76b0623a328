"""How the tables came to be, step by step; run at start where the database is older than the code."""
