"""What ships in the package, so that everything works without downloads: data, weights and their loaders."""
