"""What is said of the images that an evaluation takes."""

from syncbn.data import ImageDataModule
from syncbn.training.evaluated_images import announce_images


def test_it_is_said_that_images_may_have_been_trained_on():
    data = ImageDataModule(8, validation_images=100, test_images=50)
    for stage, images in (("test", "50 test"), ("val", "100 validation")):
        taken = f"the {images} images (held out of the training images)"
        assert announce_images(data, stage, [9850]) == announce_images(data, stage, []) == taken
        assert "; trained on may be some of them: the checkpoint had 9,900 training" in announce_images(
            data, stage, [9850, 9900]
        )
    own = ImageDataModule(8, validation_images=100)
    assert announce_images(own, "test", [10_000]) == "the 2,000 test images", "never trained on"
