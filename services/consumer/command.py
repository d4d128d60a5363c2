"""``sensor-pipeline consume``: wait for the servers, then work with the newest group protocol that they offer."""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from functools import partial

from services.consumer.lag import EXPIRY
from services.consumer.worker import Worker
from services.core.config import Settings
from services.core.database import connect_at_start
from services.core.errors import ConfigurationError, ProtocolNotOfferedError
from services.core.kafka import connect_admin, create_topics
from services.core.logs import fields
from services.core.monitoring import database_probe, kafka_probe, monitored
from services.core.shutdown import Shutdown

log = logging.getLogger("consumer")

HUNG_AFTER_S = 60.0
PROTOCOLS = {"auto": ("consumer", "classic"), "consumer": ("consumer",), "classic": ("classic",)}


def run(settings: Settings, shutdown: Shutdown, *, until_caught_up: bool = False) -> int:
    """Consume the topic into ``sensor_data``. Returns the exit code."""
    # By default each 700 new messages start a collection: a quarter of the time, and none of them is in a cycle.
    gc.freeze()
    gc.set_threshold(100_000)
    sample = partial(EXPIRY.sample, settings.kafka_topic)
    probes = partial(kafka_probe, settings, sample), partial(database_probe, settings)
    with monitored(settings, shutdown, "consumer", *probes, hung_after_s=HUNG_AFTER_S):
        create_topics(connect_admin(settings, shutdown), settings, shutdown=shutdown)
        connect_at_start(settings, shutdown, tables=True).close()
        totals = consume(settings, shutdown, until_caught_up=until_caught_up)
    log.info("stopped", extra=fields(**totals, cpu_s=round(time.process_time(), 2)))
    return 0


def consume(settings: Settings, shutdown: Shutdown, *, until_caught_up: bool) -> Counter[str]:
    """Work with the newest group protocol that the settings allow and the brokers offer."""
    reason: Exception | None = None
    for protocol in PROTOCOLS[settings.kafka_group_protocol]:
        try:
            worker = Worker(settings, shutdown, until_caught_up=until_caught_up, protocol=protocol)
            log.info("waiting_for_partitions", extra=fields(topic=settings.kafka_topic, group=settings.kafka_group))
            return worker.run()
        except ProtocolNotOfferedError as error:
            log.info("group_protocol_not_offered", extra=fields(protocol=protocol))
            reason = error
    raise ConfigurationError(
        f"KAFKA_GROUP_PROTOCOL={settings.kafka_group_protocol}: the brokers refuse it, as those before Kafka 4 do; "
        f"use auto ({reason})"
    )
