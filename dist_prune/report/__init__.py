"""Reports of runs for readers: tables as text, figures, and self-contained HTML pages."""
