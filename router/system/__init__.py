"""Parts that any program needs: errors for people, files, downloads, seconds. Knows no models."""
