"""Steps of augmentation: what makes rows, and what sifts them. One module per option of configs/augmentation."""
