"""The networks: UNet with motion modules, VAE, text encoder and SparseCtrl."""
