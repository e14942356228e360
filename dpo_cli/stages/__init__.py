"""One step of the pipeline a module: files in, files out. Stages never import each other; they meet in files."""
