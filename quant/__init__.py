"""Mathematics of weight and activation quantization: formats, packing, GPTQ, SmoothQuant, bit allocation."""
