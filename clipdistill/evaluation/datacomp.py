"""Results in DataComp's format: one line of JSON per set in ``eval_results.jsonl``, with a main metric.

Gadre et al. 2023, "DataComp", arXiv 2304.14108; the list is tasklist.yml of github.com/mlfoundations/datacomp,
restricted to classification and retrieval.
"""

from collections.abc import Mapping
from typing import Any

from clipdistill.evaluation.benchmark_format import main_metric

_SETS = {
    "vtab/caltech101": "Caltech-101",
    "cifar10": "CIFAR-10",
    "vtab/cifar100": "CIFAR-100",
    "vtab/clevr_count_all": "CLEVR Counts",
    "vtab/clevr_closest_object_distance": "CLEVR Distance",
    "country211": "Country211",
    "vtab/dtd": "Describable Textures",
    "vtab/eurosat": "EuroSAT",
    "fgvc_aircraft": "FGVC Aircraft",
    "food101": "Food-101",
    "gtsrb": "GTSRB",
    "imagenet1k": "ImageNet 1k",
    "imagenet_sketch": "ImageNet Sketch",
    "imagenetv2": "ImageNet v2",
    "imagenet-a": "ImageNet-A",
    "imagenet-o": "ImageNet-O",
    "imagenet-r": "ImageNet-R",
    "vtab/kitti_closest_vehicle_distance": "KITTI Vehicle Distance",
    "mnist": "MNIST",
    "objectnet": "ObjectNet",
    "vtab/flowers": "Oxford Flowers-102",
    "vtab/pets": "Oxford-IIIT Pet",
    "voc2007": "Pascal VOC 2007",
    "vtab/pcam": "PatchCamelyon",
    "renderedsst2": "Rendered SST2",
    "vtab/resisc45": "RESISC45",
    "cars": "Stanford Cars",
    "stl10": "STL-10",
    "sun397": "SUN397",
    "vtab/svhn": "SVHN",
    "retrieval/flickr30k": "Flickr",
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": "MSCOCO",
}
_BY_CLASS = ("vtab/caltech101", "fgvc_aircraft", "vtab/flowers", "vtab/pets")
"""Sets whose main metric is the mean recall per class."""


def datacomp_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """A result in DataComp's format.

    A folder named as in DataComp (``wds_vtab-pets_test``, or just ``pets``) gets DataComp's key, name and main metric;
    for any other, the key is the folder's name.
    """
    folder = record["dataset"].removeprefix("wds_").removesuffix("_test")
    key = next((key for key in _SETS if folder in (key.replace("/", "-"), key.rpartition("/")[2])), folder)
    metrics = record["metrics"]
    by_class = metrics.get("mean_per_class_recall") if key in _BY_CLASS else None
    main = main_metric(record)[1] if by_class is None else by_class
    return {"key": key, "dataset": _SETS.get(key, folder), "metrics": {**metrics, "main_metric": main}}
