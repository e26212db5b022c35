"""One paid request, start to finish."""
