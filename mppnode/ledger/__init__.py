"""The books: durable accounts behind one store contract."""
