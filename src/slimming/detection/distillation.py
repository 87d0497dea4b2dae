"""What a detector learns from another one's raw outputs.

The two see the same image, so that their predictions correspond one to one. Most are background, whose boxes and classes mean
nothing and would swamp the rest: they count by how sure the teacher is that there is an object. How sure it is, is itself
matched everywhere.

Source: Mehta and Ozturk, Object Detection at 200 Frames Per Second, arXiv:1805.06361, the objectness scaled distillation,
without the suppression of neighbouring predictions (feature map NMS), and with YOLOv3's losses for YOLOv2's. A divergence
stands for each cross-entropy: it has the same gradient, and is 0 where both agree.
"""

from torch import Tensor
from torch.nn import functional as F

from slimming.detection.predictions import LARGEST_EXPONENT, Predictions


def yolo_distillation(student: Predictions, teacher: Predictions, temperature: float) -> dict[str, Tensor]:
    """Return `box`, `objectness` and `classes`; each is summed over an image, the mean over the batch, as in `yolo_loss`.

    Each is that of `yolo_loss` with the teacher's prediction in the place of the truth, for all predictions.

    Args:
        teacher: without gradients.
        temperature: of the classes.
    """
    n, size = len(student.objectness), student.size
    sure = teacher.objectness.sigmoid()  # (N, P)
    wanted = teacher.extent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)  # a bad teacher's may lie anywhere
    share = (teacher.priors * wanted.exp()).prod(-1) / (size[0] * size[1])  # of the image
    weight = sure * (2 - share.clamp(max=1))
    place = divergence(student.centre, teacher.centre) + (student.extent - wanted).square() / 2  # (N, P, 2)
    classes = divergence(student.classes, teacher.classes, temperature)  # (N, P, C)
    return {
        "box": (weight[..., None] * place).sum() / n,
        "objectness": divergence(student.objectness, teacher.objectness).sum() / n,
        "classes": (sure[..., None] * classes).sum() / n,
    }


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(teacher / T || student / T) of each pair of logits, both of one chance: yes or no.

    Source: Hinton et al., arXiv:1503.02531, section 2; the gradient is T (sigmoid(student / T) - sigmoid(teacher / T)).
    """
    student, teacher = student / temperature, teacher / temperature
    wanted = teacher.sigmoid()
    cross, entropy = (
        F.binary_cross_entropy_with_logits(logits, wanted, reduction="none") for logits in (student, teacher)
    )
    return temperature**2 * (cross - entropy)
