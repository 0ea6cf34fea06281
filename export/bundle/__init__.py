"""Write a bundle: data files, the manifest, a folder that appears whole or not at all."""
