"""The kinds of image files that are read, told by their extension."""

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
GIF = "GIF is not read: convert it to PNG"
