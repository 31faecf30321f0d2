"""Fine-tuning on a few labelled images: a linear classifier, or SuNCEt."""
