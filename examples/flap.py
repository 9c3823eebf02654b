#!/usr/bin/env python3
"""A subscriber loses its connection; the messages that it missed follow when it is back.

    python3 flap.py [HOST] [PORT]

The broker behind Tidegate sees neither the loss nor the return.
"""
import queue
import socket
import sys

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

host = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1"
port = int(sys.argv[2]) if len(sys.argv) > 2 else 1883
events: queue.Queue = queue.Queue()


def client(name: str) -> mqtt.Client:
    made = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, name, protocol=mqtt.MQTTv5)
    made.on_connect = lambda c, _, flags, *rest: events.put((name, "session present" if flags.session_present else "new session"))
    made.on_subscribe = lambda *args: events.put((name, "subscribed"))
    made.on_message = lambda c, _, message: events.put((name, message.payload.decode()))
    return made


def wait_for(*event: str) -> None:
    while (seen := events.get(timeout=10)) != event:
        pass
    print(*seen, sep=": ")


# The session outlives its connection by an hour (MQTT 5, Session Expiry Interval in seconds).
hour = Properties(PacketTypes.CONNECT)
hour.SessionExpiryInterval = 3600

phone, backend = client("phone"), client("backend")
backend.connect(host, port)
backend.loop_start()
wait_for("backend", "new session")

phone.connect(host, port, clean_start=True, properties=hour)
phone.loop_start()
wait_for("phone", "new session")
phone.subscribe("doors/front", qos=1)
wait_for("phone", "subscribed")

# The network is gone: no DISCONNECT, the socket just ends.
phone.loop_stop()
phone.socket().shutdown(socket.SHUT_RDWR)
print("phone: offline")
for message in ("opened", "closed"):
    backend.publish("doors/front", message, qos=1).wait_for_publish(10)

phone.connect(host, port, clean_start=False, properties=hour)
phone.loop_start()
wait_for("phone", "session present")
wait_for("phone", "opened")
wait_for("phone", "closed")

# An expiry of 0 in DISCONNECT ends the session now.
over = Properties(PacketTypes.DISCONNECT)
over.SessionExpiryInterval = 0
phone.disconnect(properties=over)
backend.disconnect()
for each in (phone, backend):
    each.loop_stop()
