from pallas_kernels.attend_zones.api import attend_zones as attend_zones
from pallas_kernels.attend_zones.reference import ZoneStates as ZoneStates
