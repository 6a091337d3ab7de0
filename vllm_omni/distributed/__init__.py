"""Transport between stages. Knows bytes and keys; knows no model and no stage semantics."""
