"""Models that write text for augmentation. One module per option of configs/writer."""
