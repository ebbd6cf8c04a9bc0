"""Models: plain single-device modules over ``ArchSpec``, named as ``iter_params`` names tensors."""
