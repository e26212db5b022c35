"""What ``mppnode doctor`` looks at: one file per theme, each check one function that reads and says what it found."""
