"""The simulated engine: no model, but the behaviour of one; for tests, demonstrations and load tests."""

from model_servers.engine import EnginePlugin
from model_servers.engines.simulated.engine import SimulatedEngine
from model_servers.engines.simulated.settings import Fault, SimulatedModel, SimulatedSettings

__all__ = ["Fault", "SimulatedEngine", "SimulatedModel", "SimulatedSettings", "plugin"]

plugin = EnginePlugin(name="simulated", settings=SimulatedSettings, create=SimulatedEngine)
