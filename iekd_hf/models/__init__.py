"""Networks come in: by Hub id or folder, with adapters, and a small ResNet for 32x32 images."""
