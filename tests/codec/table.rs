//! Frames by the statement that judges them. A verdict of 0 means "legal"; otherwise it is the
//! reason code of the refusal (in 3.x the code is for the log only).

use crate::frames::packet;
use tidegate::mqtt::Receiver::{Client, Server};
use tidegate::mqtt::Version::{V5, V31, V311};
use tidegate::mqtt::{Decoder, Receiver, Version, decode_connect};

type Row = (&'static str, Version, Receiver, u8, &'static [u8], u8);

const MALFORMED: u8 = 0x81;
const PROTOCOL: u8 = 0x82;
const VERSION: u8 = 0x84;
const FILTER: u8 = 0x8F;
const NAME: u8 = 0x90;
const ALIAS: u8 = 0x94;

/// First byte and body; the test inserts the length between them.
#[rustfmt::skip] // one row, one line
const BODIES: &[Row] = &[
    // PUBLISH
    ("3.3 QoS 0", V311, Server, 0x30, b"\0\x01ahi", 0),
    ("3.3 QoS 1", V5, Server, 0x32, b"\0\x01a\0\x01\0hi", 0),
    ("3.3 empty payload", V5, Client, 0x31, b"\0\x01a\0", 0),
    ("MQTT-1.5.4-3 a BOM is data", V5, Server, 0x30, b"\0\x04\xEF\xBB\xBFa\0", 0),
    ("MQTT-3.3.1-4 QoS 3", V5, Server, 0x36, b"\0\x01a\0\x01\0", MALFORMED),
    ("MQTT-3.3.1-4 of 3.1.1", V311, Server, 0x36, b"\0\x01a\0\x01", MALFORMED),
    ("MQTT-3.3.1-2 DUP at QoS 0", V5, Server, 0x38, b"\0\x01a\0", MALFORMED),
    ("MQTT-3.3.1-2 of 3.1.1", V311, Client, 0x38, b"\0\x01a", MALFORMED),
    ("MQTT-3.3.2-2 +", V5, Server, 0x30, b"\0\x03a/+\0", NAME),
    ("MQTT-3.3.2-2 #", V5, Client, 0x30, b"\0\x01#\0", NAME),
    ("MQTT-3.3.2-2 of 3.1.1", V311, Server, 0x30, b"\0\x03a/#", NAME),
    ("MQTT-1.5.4-2 U+0000", V5, Server, 0x30, b"\0\x03a\0b\0", MALFORMED),
    ("MQTT-1.5.3-2 of 3.1.1 U+0000", V311, Server, 0x30, b"\0\x03a\0b", MALFORMED),
    ("MQTT-1.5.4-1 not UTF-8", V5, Server, 0x30, b"\0\x02\xC3\x28\0", MALFORMED),
    ("MQTT-1.5.4-1 surrogate", V5, Server, 0x30, b"\0\x03\xED\xA0\x80\0", MALFORMED),
    ("MQTT-1.5.4-1 overlong", V5, Server, 0x30, b"\0\x02\xC0\xAF\0", MALFORMED),
    ("MQTT-3.3.2-13 Response Topic not UTF-8", V5, Server, 0x30, b"\0\x01a\x05\x08\0\x02\xC3\x28", MALFORMED),
    ("MQTT-2.2.1-3 packet identifier 0", V5, Server, 0x32, b"\0\x01a\0\0\0", PROTOCOL),
    ("MQTT-2.3.1-1 of 3.1.1", V311, Server, 0x34, b"\0\x01a\0\0", PROTOCOL),
    ("3.3.2.1 empty topic, no alias", V5, Server, 0x30, b"\0\0\0", PROTOCOL),
    ("3.3.2.1 empty topic, alias", V5, Server, 0x30, b"\0\0\x03\x23\0\x01", 0),
    ("MQTT-4.7.3-1 of 3.1.1 empty topic", V311, Server, 0x30, b"\0\0", NAME),
    ("MQTT-3.3.2-8 alias 0", V5, Server, 0x30, b"\0\x01a\x03\x23\0\0", ALIAS),
    ("3.3.2.3.4 alias twice", V5, Server, 0x30, b"\0\x01a\x06\x23\0\x01\x23\0\x01", PROTOCOL),
    ("MQTT-3.3.4-6 identifier from a client", V5, Server, 0x30, b"\0\x01a\x02\x0B\x01", PROTOCOL),
    ("3.3.2.3.8 identifiers from a server", V5, Client, 0x30, b"\0\x01a\x04\x0B\x01\x0B\x02", 0),
    ("3.3.2.3.8 identifier 0", V5, Client, 0x30, b"\0\x01a\x02\x0B\0", PROTOCOL),
    ("MQTT-3.3.2-14 response topic +", V5, Server, 0x30, b"\0\x01a\x05\x08\0\x02/+", PROTOCOL),
    ("MQTT-4.7.3-1 response topic empty", V5, Server, 0x30, b"\0\x01a\x03\x08\0\0", PROTOCOL),
    ("3.3.2.3.2 format 2", V5, Server, 0x30, b"\0\x01a\x02\x01\x02", PROTOCOL),
    ("3.3.2.3.2 format 1, payload not checked", V5, Server, 0x30, b"\0\x01a\x02\x01\x01\xFF", 0),
    ("3.3.2.3.3 expiry twice", V5, Server, 0x30, b"\0\x01a\x0A\x02\0\0\0\x01\x02\0\0\0\x01", PROTOCOL),
    ("2.2.2.2 property of CONNECT", V5, Server, 0x30, b"\0\x01a\x03\x21\0\x01", MALFORMED),
    ("2.2.2.2 unknown property", V5, Server, 0x30, b"\0\x01a\x02\x04\0", MALFORMED),
    ("2.2.2.2 identifier of two bytes", V5, Server, 0x30, b"\0\x01a\x03\x81\0\x01", MALFORMED),
    ("2.2.2.1 property length beyond", V5, Server, 0x30, b"\0\x01a\x05\x01\x01", MALFORMED),
    ("2.2.2.1 property cut", V5, Server, 0x30, b"\0\x01a\x03\x02\0\0", MALFORMED),
    ("MQTT-1.5.5-1 property length", V5, Server, 0x30, b"\0\x01a\x80\0", MALFORMED),
    ("MQTT-1.5.5-1 subscription identifier", V5, Client, 0x30, b"\0\x01a\x03\x0B\x81\0", MALFORMED),
    ("MQTT-1.5.7-1 user property", V5, Server, 0x30, b"\0\x01a\x06\x26\0\x01\0\0\0", MALFORMED),
    ("3.3.2.3.7 equal user properties", V5, Server, 0x30,
        b"\0\x01a\x0E\x26\0\x01k\0\x01v\x26\0\x01k\0\x01v", 0),
    ("MQTT-3.3.2-19 content type", V5, Server, 0x30, b"\0\x01a\x04\x03\0\x01\xFF", MALFORMED),
    ("MQTT-3.3.2-1 topic cut", V5, Server, 0x30, b"\0\x05a", MALFORMED),
    ("2.2.1 identifier cut", V5, Server, 0x32, b"\0\x01a\x01", MALFORMED),
    // Acknowledgements
    ("3.4 PUBACK", V311, Server, 0x40, b"\0\x01", 0),
    ("3.4.2.1 PUBACK with a code only", V5, Server, 0x40, b"\0\x01\x10", 0),
    ("MQTT-3.4.2-1 PUBACK code", V5, Server, 0x40, b"\0\x01\x92", PROTOCOL),
    ("MQTT-3.5.2-1 PUBREC code", V5, Client, 0x50, b"\0\x01\x01", PROTOCOL),
    ("MQTT-3.6.2-1 PUBREL code", V5, Server, 0x62, b"\0\x01\x10", PROTOCOL),
    ("MQTT-3.7.2-1 PUBCOMP code", V5, Server, 0x70, b"\0\x01\x80", PROTOCOL),
    ("3.4.2.2 PUBACK with properties", V5, Server, 0x40, b"\0\x01\0\x04\x1F\0\x01x", 0),
    ("3.4.2.2.2 reason string twice", V5, Server, 0x40, b"\0\x01\0\x08\x1F\0\x01x\x1F\0\x01x", PROTOCOL),
    ("2.2.1 PUBACK of packet identifier 0", V5, Server, 0x40, b"\0\0", PROTOCOL),
    ("3.4 of 3.1.1 PUBACK with more", V311, Server, 0x40, b"\0\x01\0", MALFORMED),
    ("3.4 PUBACK cut", V5, Server, 0x40, b"\0", MALFORMED),
    ("3.4.2.2 trailing bytes", V5, Server, 0x40, b"\0\x01\0\0\0", MALFORMED),
    ("MQTT-3.6.1-1 PUBREL flags", V5, Server, 0x60, b"\0\x01", MALFORMED),
    ("MQTT-3.6.1-1 of 3.1.1", V311, Server, 0x6A, b"\0\x01", MALFORMED),
    ("3.1: PUBREL may have DUP", V31, Server, 0x6A, b"\0\x01", 0),
    ("MQTT-2.1.3-1 PUBACK flags", V5, Server, 0x42, b"\0\x01", MALFORMED),
    // SUBSCRIBE
    ("3.8", V5, Server, 0x82, b"\0\x01\0\0\x03a/b\x01", 0),
    ("3.8 of 3.1.1", V311, Server, 0x82, b"\0\x01\0\x03a/#\x02", 0),
    ("MQTT-3.8.1-1 flags", V5, Server, 0x80, b"\0\x01\0\0\x01a\0", MALFORMED),
    ("MQTT-3.8.1-1 of 3.1.1", V311, Server, 0x8A, b"\0\x01\0\x01a\0", MALFORMED),
    ("3.1: SUBSCRIBE may have DUP", V31, Server, 0x8A, b"\0\x01\0\x01a\0", 0),
    ("MQTT-2.2.1-3 SUBSCRIBE identifier 0", V5, Server, 0x82, b"\0\0\0\0\x01a\0", PROTOCOL),
    ("MQTT-3.8.3-2 no filter", V5, Server, 0x82, b"\0\x01\0", PROTOCOL),
    ("MQTT-3.8.3-3 of 3.1.1 no filter", V311, Server, 0x82, b"\0\x01", PROTOCOL),
    ("MQTT-4.7.1-1 a/#/b", V5, Server, 0x82, b"\0\x01\0\0\x05a/#/b\0", FILTER),
    ("MQTT-4.7.1-1 a#", V311, Server, 0x82, b"\0\x01\0\x02a#\0", FILTER),
    ("MQTT-4.7.1-2 a+/b", V5, Server, 0x82, b"\0\x01\0\0\x04a+/b\0", FILTER),
    ("MQTT-4.7.1-3 of 3.1.1 +a", V311, Server, 0x82, b"\0\x01\0\x02+a\0", FILTER),
    ("MQTT-4.7.3-1 empty filter", V5, Server, 0x82, b"\0\x01\0\0\0\0", FILTER),
    ("MQTT-4.7.3-2 U+0000", V5, Server, 0x82, b"\0\x01\0\0\x01\0\0", MALFORMED),
    ("MQTT-3.8.3-5 reserved bits", V5, Server, 0x82, b"\0\x01\0\0\x01a\x40", MALFORMED),
    ("MQTT-3.8.3-4 of 3.1.1 reserved bits", V311, Server, 0x82, b"\0\x01\0\x01a\x04", MALFORMED),
    ("3.8.3.1 QoS 3", V5, Server, 0x82, b"\0\x01\0\0\x01a\x03", PROTOCOL),
    ("MQTT-3.8.3-4 of 3.1.1 QoS 3", V311, Server, 0x82, b"\0\x01\0\x01a\x03", MALFORMED),
    ("3.8.3.1 Retain Handling 3", V5, Server, 0x82, b"\0\x01\0\0\x01a\x30", PROTOCOL),
    ("3.8.3.1 all options", V5, Server, 0x82, b"\0\x01\0\0\x01a\x2E", 0),
    ("4.8.2 shared", V5, Server, 0x82, b"\0\x01\0\0\x0A$share/g/a\x01", 0),
    ("MQTT-3.8.3-4 shared with No Local", V5, Server, 0x82, b"\0\x01\0\0\x0A$share/g/a\x05", PROTOCOL),
    ("MQTT-4.8.2-1 no group", V5, Server, 0x82, b"\0\x01\0\0\x09$share//a\x01", FILTER),
    ("MQTT-4.8.2-2 no filter", V5, Server, 0x82, b"\0\x01\0\0\x08$share/g\x01", FILTER),
    ("MQTT-4.8.2-2 wildcard in the group", V5, Server, 0x82, b"\0\x01\0\0\x0A$share/+/a\x01", FILTER),
    ("3.8.2.1.2 identifier", V5, Server, 0x82, b"\0\x01\x05\x0B\xFF\xFF\xFF\x7F\0\x01a\0", 0),
    ("3.8.2.1.2 identifier 0", V5, Server, 0x82, b"\0\x01\x02\x0B\0\0\x01a\0", PROTOCOL),
    ("3.8.2.1.2 identifier twice", V5, Server, 0x82, b"\0\x01\x04\x0B\x01\x0B\x01\0\x01a\0", PROTOCOL),
    ("3.8.3 options missing", V5, Server, 0x82, b"\0\x01\0\0\x01a", MALFORMED),
    // UNSUBSCRIBE
    ("3.10", V5, Server, 0xA2, b"\0\x01\0\0\x01a", 0),
    ("MQTT-3.10.1-1 flags", V5, Server, 0xA0, b"\0\x01\0\0\x01a", MALFORMED),
    ("3.1: UNSUBSCRIBE may have DUP", V31, Server, 0xAA, b"\0\x01\0\x01a", 0),
    ("MQTT-3.10.3-2 no filter", V5, Server, 0xA2, b"\0\x01\0", PROTOCOL),
    ("MQTT-3.10.3-1 not UTF-8", V5, Server, 0xA2, b"\0\x01\0\0\x01\xFF", MALFORMED),
    ("MQTT-4.7.1-1 in UNSUBSCRIBE", V5, Server, 0xA2, b"\0\x01\0\0\x03#/a", FILTER),
    // SUBACK, UNSUBACK
    ("3.9", V5, Client, 0x90, b"\0\x01\0\x00\x01\x02\x87", 0),
    ("MQTT-3.9.3-2 code", V5, Client, 0x90, b"\0\x01\0\x03", PROTOCOL),
    ("MQTT-3.9.3-2 of 3.1.1", V311, Client, 0x90, b"\0\x01\x87", PROTOCOL),
    ("MQTT-3.8.4-6 no code", V5, Client, 0x90, b"\0\x01\0", PROTOCOL),
    ("3.11", V5, Client, 0xB0, b"\0\x01\0\x11", 0),
    ("3.11 of 3.1.1", V311, Client, 0xB0, b"\0\x01", 0),
    ("MQTT-3.11.3-2 code", V5, Client, 0xB0, b"\0\x01\0\x01", PROTOCOL),
    ("3.11 of 3.1.1 has no codes", V311, Client, 0xB0, b"\0\x01\0", MALFORMED),
    // CONNACK
    ("3.2", V5, Client, 0x20, b"\x01\0\0", 0),
    ("3.2 of 3.1.1", V311, Client, 0x20, b"\x01\0", 0),
    ("MQTT-3.1.2-2 of 3.1.1, said to MQTT 5", V5, Client, 0x20, b"\0\x01", 0),
    ("3.2.2.3 of 3.1.1, said to MQTT 5", V5, Client, 0x20, b"\0\x02", PROTOCOL),
    ("MQTT-3.2.2-1 flags", V5, Client, 0x20, b"\x02\0\0", MALFORMED),
    ("3.1: first byte is 0", V31, Client, 0x20, b"\x01\0", MALFORMED),
    ("MQTT-3.2.2-6 refused, present", V5, Client, 0x20, b"\x01\x87\0", PROTOCOL),
    ("MQTT-3.2.2-4 of 3.1.1", V311, Client, 0x20, b"\x01\x05", PROTOCOL),
    ("MQTT-3.2.2-8 code", V5, Client, 0x20, b"\0\x92\0", PROTOCOL),
    ("3.2.2.3 of 3.1.1 code 6", V311, Client, 0x20, b"\0\x06", MALFORMED),
    ("3.2.2.3.3 Receive Maximum 0", V5, Client, 0x20, b"\0\0\x03\x21\0\0", PROTOCOL),
    ("3.2.2.3.4 Maximum QoS 2", V5, Client, 0x20, b"\0\0\x02\x24\x02", PROTOCOL),
    ("3.2.2.3.5 Retain Available 2", V5, Client, 0x20, b"\0\0\x02\x25\x02", PROTOCOL),
    ("3.2.2.3.6 Maximum Packet Size 0", V5, Client, 0x20, b"\0\0\x05\x27\0\0\0\0", PROTOCOL),
    ("2.2.2.2 Will Delay in CONNACK", V5, Client, 0x20, b"\0\0\x05\x18\0\0\0\0", MALFORMED),
    ("3.2 no property length", V5, Client, 0x20, b"\0\0", MALFORMED),
    // PINGREQ, DISCONNECT, AUTH, types
    ("3.12", V311, Server, 0xC0, b"", 0),
    ("3.12.1 body", V311, Server, 0xC0, b"\0", MALFORMED),
    ("MQTT-2.1.3-1 PINGREQ flags", V5, Server, 0xC1, b"", MALFORMED),
    ("3.13", V5, Client, 0xD0, b"", 0),
    ("3.14.2.1 no code", V5, Server, 0xE0, b"", 0),
    ("3.14.2.2.1 code only", V5, Client, 0xE0, b"\x8E", 0),
    ("MQTT-3.14.1-1 flags", V5, Server, 0xE1, b"", MALFORMED),
    ("MQTT-3.14.1-1 of 3.1.1", V311, Server, 0xE2, b"", MALFORMED),
    ("3.14 of 3.1.1 body", V311, Server, 0xE0, b"\0", MALFORMED),
    ("MQTT-3.14.2-1 code", V5, Server, 0xE0, b"\x01", PROTOCOL),
    ("MQTT-3.14.2-1 a server's code", V5, Server, 0xE0, b"\x8E", PROTOCOL),
    ("3.14.2.2.2 expiry by a client", V5, Server, 0xE0, b"\0\x05\x11\0\0\0\x01", 0),
    ("MQTT-3.14.2-2 expiry by a server", V5, Client, 0xE0, b"\0\x05\x11\0\0\0\x01", PROTOCOL),
    ("3.14 of 3.1.1 by a server", V311, Client, 0xE0, b"", PROTOCOL),
    ("3.15", V5, Server, 0xF0, b"\x18\x04\x15\0\x01m", 0),
    ("MQTT-3.15.1-1 flags", V5, Server, 0xF1, b"\x18\x04\x15\0\x01m", MALFORMED),
    ("MQTT-3.15.2-1 code", V5, Server, 0xF0, b"\x01\x04\x15\0\x01m", PROTOCOL),
    ("MQTT-3.15.2-1 a server's code", V5, Server, 0xF0, b"\0\x04\x15\0\x01m", PROTOCOL),
    ("3.15.2.2.2 no method", V5, Server, 0xF0, b"\x18\0", PROTOCOL),
    ("3.15.2.1 bare success", V5, Client, 0xF0, b"", 0),
    ("2.1.2 AUTH in 3.1.1", V311, Server, 0xF0, b"", MALFORMED),
    ("2.1.2 type 0", V5, Server, 0x00, b"", MALFORMED),
    ("3.2 CONNACK from a client", V5, Server, 0x20, b"\0\0\0", PROTOCOL),
    ("3.8 SUBSCRIBE from a server", V5, Client, 0x82, b"\0\x01\0\0\x01a\0", PROTOCOL),
    ("3.12 PINGREQ from a server", V5, Client, 0xC0, b"", PROTOCOL),
    ("3.13 PINGRESP from a client", V311, Server, 0xD0, b"", PROTOCOL),
];

/// Bodies of CONNECT, from the level on where `MQTT` is the name.
#[rustfmt::skip]
const CONNECTS: &[(&str, &[u8], u8)] = &[
    ("3.1 of 5", b"\0\x04MQTT\x05\x02\0\x0A\0\0\x01c", 0),
    ("3.1 of 3.1.1", b"\0\x04MQTT\x04\x02\0\x0A\0\x01c", 0),
    ("3.1: MQIsdp 3", b"\0\x06MQIsdp\x03\x02\0\x0A\0\x01c", 0),
    ("MQTT-3.1.2-1 name", b"\0\x04MQTx\x05\x02\0\x0A\0\0\x01c", VERSION),
    ("MQTT-3.1.2-1 case", b"\0\x04mqtt\x05\x02\0\x0A\0\0\x01c", VERSION),
    ("MQTT-3.1.2-2 level 6", b"\0\x04MQTT\x06\x02\0\x0A\0\0\x01c", VERSION),
    ("MQTT-3.1.2-2 MQTT 3", b"\0\x04MQTT\x03\x02\0\x0A\0\x01c", VERSION),
    ("MQTT-3.1.2-2 MQIsdp 4", b"\0\x06MQIsdp\x04\x02\0\x0A\0\x01c", VERSION),
    ("bridge bit of 3.1.1", b"\0\x04MQTT\x84\x02\0\x0A\0\x01c", 0),
    ("bridge bit of 3.1", b"\0\x06MQIsdp\x83\x02\0\x0A\0\x01c", 0),
    ("MQTT-3.1.2-2 bridge bit of 5", b"\0\x04MQTT\x85\x02\0\x0A\0\0\x01c", VERSION),
    ("MQTT-3.1.2-2 bridge bit, level 3", b"\0\x04MQTT\x83\x02\0\x0A\0\x01c", VERSION),
    ("MQTT-3.1.2-2 bridge bit, MQIsdp 4", b"\0\x06MQIsdp\x84\x02\0\x0A\0\x01c", VERSION),
    ("MQTT-3.1.2-3 reserved flag", b"\0\x04MQTT\x05\x03\0\x0A\0\0\x01c", MALFORMED),
    ("MQTT-3.1.2-3 of 3.1.1", b"\0\x04MQTT\x04\x03\0\x0A\0\x01c", MALFORMED),
    ("MQTT-3.1.2-11 Will QoS alone", b"\0\x04MQTT\x05\x0A\0\x0A\0\0\x01c", MALFORMED),
    ("MQTT-3.1.2-13 Will Retain alone", b"\0\x04MQTT\x04\x22\0\x0A\0\x01c", MALFORMED),
    ("MQTT-3.1.2-12 Will QoS 3", b"\0\x04MQTT\x05\x1E\0\x0A\0\0\x01c\0\0\x01w\0\0", MALFORMED),
    ("3.1.3 will", b"\0\x04MQTT\x05\x36\0\x0A\0\0\x01c\0\0\x01w\0\x01p", 0),
    ("MQTT-3.1.2-9 will missing", b"\0\x04MQTT\x05\x06\0\x0A\0\0\x01c", MALFORMED),
    ("MQTT-4.7.0-1 will topic +", b"\0\x04MQTT\x05\x06\0\x0A\0\0\x01c\0\0\x01+\0\0", NAME),
    ("MQTT-4.7.1-1 of 3.1.1 will topic #", b"\0\x04MQTT\x04\x06\0\x0A\0\x01c\0\x01#\0\0", NAME),
    ("MQTT-4.7.3-1 will topic empty", b"\0\x04MQTT\x05\x06\0\x0A\0\0\x01c\0\0\0\0\0", NAME),
    ("MQTT-3.1.3-11 will topic not UTF-8", b"\0\x04MQTT\x05\x06\0\x0A\0\0\x01c\0\0\x01\xFF\0\0", MALFORMED),
    ("3.1.3.2.2 Will Delay twice",
        b"\0\x04MQTT\x05\x06\0\x0A\0\0\x01c\x0A\x18\0\0\0\x01\x18\0\0\0\x01\0\x01w\0\0", PROTOCOL),
    ("2.2.2.2 alias in a will", b"\0\x04MQTT\x05\x06\0\x0A\0\0\x01c\x03\x23\0\x01\0\x01w\0\0", MALFORMED),
    ("MQTT-3.1.3-4 client id not UTF-8", b"\0\x04MQTT\x05\x02\0\x0A\0\0\x01\xFF", MALFORMED),
    ("MQTT-1.5.4-2 client id U+0000", b"\0\x04MQTT\x05\x02\0\x0A\0\0\x01\0", MALFORMED),
    ("MQTT-3.1.3-3 no client id", b"\0\x04MQTT\x05\x02\0\x0A\0", MALFORMED),
    ("MQTT-3.1.3-6 empty client id", b"\0\x04MQTT\x05\x00\0\x0A\0\0\0", 0),
    ("MQTT-3.1.3-8 of 3.1.1 is the session's", b"\0\x04MQTT\x04\x00\0\x0A\0\0", 0),
    ("MQTT-3.1.2-17 user name missing", b"\0\x04MQTT\x05\x82\0\x0A\0\0\x01c", MALFORMED),
    ("MQTT-3.1.3-12 user name not UTF-8", b"\0\x04MQTT\x05\x82\0\x0A\0\0\x01c\0\x01\xFF", MALFORMED),
    ("MQTT-3.1.2-16 trailing bytes", b"\0\x04MQTT\x05\x02\0\x0A\0\0\x01c\0\x01u", MALFORMED),
    ("MQTT-3.1.2-18 of 3.1.1 trailing bytes", b"\0\x04MQTT\x04\x02\0\x0A\0\x01cx", MALFORMED),
    ("3.1.2.9 password alone in 5", b"\0\x04MQTT\x05\x42\0\x0A\0\0\x01c\0\x01p", 0),
    ("MQTT-3.1.2-22 of 3.1.1 password alone", b"\0\x04MQTT\x04\x42\0\x0A\0\x01c\0\x01p", MALFORMED),
    ("3.1: password alone as in 3.1.1", b"\0\x06MQIsdp\x03\x42\0\x0A\0\x01c\0\x01p", MALFORMED),
    ("MQTT-3.1.2-19 password any bytes", b"\0\x04MQTT\x04\xC2\0\x0A\0\x01c\0\x01u\0\x02\0\xFF", 0),
    ("3.1.2.11.10 data without method", b"\0\x04MQTT\x05\x02\0\x0A\x04\x16\0\x01d\0\x01c", PROTOCOL),
    ("3.1.2.11.9 method", b"\0\x04MQTT\x05\x02\0\x0A\x08\x16\0\x01d\x15\0\x01m\0\x01c", 0),
    ("3.1.2.11.2 expiry twice", b"\0\x04MQTT\x05\x02\0\x0A\x0A\x11\0\0\0\x01\x11\0\0\0\x01\0\x01c", PROTOCOL),
    ("3.1.2.11.3 Receive Maximum 0", b"\0\x04MQTT\x05\x02\0\x0A\x03\x21\0\0\0\x01c", PROTOCOL),
    ("3.1.2.11.4 Maximum Packet Size 0", b"\0\x04MQTT\x05\x02\0\x0A\x05\x27\0\0\0\0\0\x01c", PROTOCOL),
    ("3.1.2.11.6 Response Information 2", b"\0\x04MQTT\x05\x02\0\x0A\x02\x19\x02\0\x01c", PROTOCOL),
    ("3.1.2.11.7 Problem Information 2", b"\0\x04MQTT\x05\x02\0\x0A\x02\x17\x02\0\x01c", PROTOCOL),
    ("2.2.2.2 reason string in CONNECT", b"\0\x04MQTT\x05\x02\0\x0A\x03\x1F\0\0\0\x01c", MALFORMED),
];

#[test]
fn frames_are_judged() {
    let mut wrong = Vec::new();
    for &(statement, version, receiver, first, body, verdict) in BODIES {
        let frame = packet(first, body.to_vec());
        let decoder = Decoder {
            version,
            receiver,
            max: u32::MAX,
        };
        let got = match decoder.next(&frame) {
            Ok(Some((_, taken))) if taken == frame.len() => 0,
            Ok(other) => panic!("{statement}: {other:?}"),
            Err(e) => e.reason_code().0,
        };
        if got != verdict {
            wrong.push(format!(
                "{statement} ({version:?} {frame:02X?}): {got:#X}, not {verdict:#X}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn connects_are_judged() {
    for &(statement, body, verdict) in CONNECTS {
        let frame = packet(0x10, body.to_vec());
        let got = decode_connect(&frame, u32::MAX);
        let code = got.as_ref().map_or_else(|e| e.reason_code().0, |_| 0);
        assert_eq!(code, verdict, "{statement}: {got:?}");
        // The general decoder judges a CONNECT by the version that it names, too.
        let decoder = Decoder {
            version: V5,
            receiver: Server,
            max: u32::MAX,
        };
        let code = decoder
            .next(&frame)
            .map_or_else(|e| e.reason_code().0, |_| 0);
        assert_eq!(code, verdict, "{statement}");
    }
}

/// Fixed headers whose length field is the subject.
#[test]
fn lengths_are_judged() {
    let next = |version, bytes: &[u8]| {
        let decoder = Decoder {
            version,
            receiver: Server,
            max: 1 << 20,
        };
        match decoder.next(bytes) {
            Ok(None) => Err(0),
            Ok(Some((_, taken))) => Ok(taken),
            Err(e) => Err(e.reason_code().0),
        }
    };
    // [MQTT-1.5.5-1] demands the shortest form in MQTT 5; 3.x (2.2.3) does not.
    assert_eq!(next(V5, &[0xC0, 0x80, 0x00]), Err(MALFORMED));
    assert_eq!(next(V311, &[0xC0, 0x80, 0x00]), Ok(3));
    assert_eq!(next(V31, &[0xC0, 0x80, 0x80, 0x80, 0x00]), Ok(5));
    // 2.1.4, 2.2.3: the length never has more than four bytes.
    assert_eq!(next(V311, &[0xC0, 0x80, 0x80, 0x80, 0x80]), Err(MALFORMED));
    assert_eq!(next(V5, &[0x30, 0xFF, 0xFF, 0xFF, 0xFF]), Err(MALFORMED));
    assert_eq!(next(V5, &[0x30, 0xFF, 0xFF, 0xFF]), Err(0));
    // 3.1.2.11.4: the bound includes the header and is judged before the body has arrived.
    assert_eq!(next(V5, &[0x30, 0xFF, 0xFF, 0xFF, 0x7F]), Err(0x95));
    assert_eq!(next(V5, &[0x30, 0xFD, 0xFF, 0x3F]), Err(0x95));
    assert_eq!(next(V5, &[0x30, 0xFC, 0xFF, 0x3F]), Err(0));
    // The first byte is judged alone.
    assert_eq!(next(V5, &[0x00]), Err(MALFORMED));
    assert_eq!(next(V5, &[0x36]), Err(MALFORMED));
    assert_eq!(next(V5, &[]), Err(0));

    let first = |bytes: &[u8], max| match decode_connect(bytes, max) {
        Ok(None) => Err(0),
        Ok(Some((_, taken))) => Ok(taken),
        Err(e) => Err(e.reason_code().0),
    };
    // MQTT-3.1.0-1: CONNECT comes first; HTTP, TLS and the like are recognised at once.
    assert_eq!(first(b"G", 100), Err(PROTOCOL));
    assert_eq!(first(&[0x16, 0x03], 100), Err(MALFORMED));
    assert_eq!(first(&[0xC0, 0x00], 100), Err(PROTOCOL));
    assert_eq!(first(&[0x12], 100), Err(MALFORMED));
    assert_eq!(first(&[0x10, 0x80, 0x80, 0x01], 100), Err(0x95));
    let v5 = b"\x10\x8E\x00\0\x04MQTT\x05\x02\0\x0A\0\0\x01c";
    assert_eq!(first(v5, 100), Err(MALFORMED));
    let v311 = b"\x10\x8D\x00\0\x04MQTT\x04\x02\0\x0A\0\x01c";
    assert_eq!(first(v311, 100), Ok(16));
}
