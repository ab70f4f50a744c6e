from pallas_kernels.build_clusters.api import build_clusters as build_clusters
from pallas_kernels.build_clusters.reference import Clusters as Clusters
from pallas_kernels.build_clusters.reference import capacity as capacity
