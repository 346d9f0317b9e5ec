"""What a Sentinel-2 product is: bands, grids, catalogues."""
