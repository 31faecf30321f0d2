"""The data set knows the epoch."""

from short_runs import RandomViews, make_trainer


class RecordedViews(RandomViews):
    """Views that record the epoch in which each row is read."""

    def __init__(self, num_images):
        super().__init__(num_images)
        self.reads = []

    def __getitem__(self, row):
        self.reads.append((self.epoch, row))
        return super().__getitem__(row)


def test_the_data_set_gets_each_epoch_before_it_is_read(tmp_path):
    dataset = RecordedViews(8)
    make_trainer(tmp_path, dataset, max_steps=-1, num_train_epochs=3, save_strategy="no").train()
    assert sorted(dataset.reads) == [(epoch, row) for epoch in range(3) for row in range(8)]
