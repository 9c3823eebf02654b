//! The oracle's view of packets: what a session took, and what it wrote.

use std::time::Duration;

use tidegate::mqtt::{
    Decoder, Packet, Publish, QoS, ReasonCode, Receiver, Suback, Subscribe, SubscribeOptions,
    Unsubscribe, Version,
};
use tidegate::time::Millis;

use crate::ledger::{Ask, Ledger, Sub, Want};
use crate::oracle::{Checked, Client, Oracle, RECOVERY, key};
use tidegate::streams::StreamId;

impl Oracle {
    /// The client's session took a packet of the client.
    pub(crate) fn took(
        &mut self,
        device: usize,
        stream: StreamId,
        packet: &Packet<'_>,
        now: Millis,
    ) {
        let (grants, expiry_max) = (self.rules.grants, self.rules.expiry_max);
        let latest = self.latest;
        let in_order = self.away.1.is_some();
        self.asks += 1;
        let number = self.asks;
        let c = &mut self.clients[device];
        let Some(link) = c.attached else {
            return;
        };
        match packet {
            Packet::Publish(p) => {
                if self.trace {
                    let id = &c.profile.id;
                    crate::trace::line(format_args!(
                        "         {id} on {stream}, link {link}: {}",
                        short(packet)
                    ));
                }
                let topic = match p.topic_alias {
                    Some(alias) if p.topic.is_empty() => c.aliases_in[&(stream, alias)].clone(),
                    Some(alias) => {
                        c.aliases_in.insert((stream, alias), p.topic.to_owned());
                        p.topic.to_owned()
                    }
                    None => p.topic.to_owned(),
                };
                self.inbound.publish(device, stream, &topic, p, now);
            }
            Packet::Puback(a) => {
                c.ledger
                    .acknowledged(&mut c.window, a.packet_id, QoS::AtLeastOnce);
            }
            Packet::Pubcomp(a) => {
                c.ledger
                    .acknowledged(&mut c.window, a.packet_id, QoS::ExactlyOnce);
            }
            Packet::Pubrec(a) => c.ledger.received(a.packet_id),
            Packet::Pubrel(a) => self.inbound.released(device, a.packet_id),
            Packet::Subscribe(s) => {
                c.subscribes(link, stream, s, grants, (number, in_order), now);
            }
            Packet::Unsubscribe(u) => c.unsubscribes(stream, u, latest),
            Packet::Disconnect(d) => {
                if let Some(expiry) = d.session_expiry {
                    c.expiry = expiry.min(expiry_max);
                }
            }
            _ => {}
        }
    }

    /// Bytes that the router wrote for the connection.
    pub(crate) fn wrote(
        &mut self,
        device: usize,
        link: u64,
        stream: StreamId,
        bytes: &[u8],
        now: Millis,
    ) -> Checked {
        let c = &self.clients[device];
        if c.attached != Some(link) {
            return Ok(());
        }
        let version = c.profile.version;
        if self.trace {
            let id = &c.profile.id;
            crate::trace::line(format_args!(
                "         {id} is written on {stream}: {bytes:02x?}"
            ));
        }
        let decoder = Decoder {
            version,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let mut at = 0;
        while let Some((packet, size)) = decoder
            .next(&bytes[at..])
            .map_err(|e| format!("what was written does not decode: {e}"))?
        {
            at += size;
            let c = &self.clients[device];
            if version == Version::V5
                && c.profile.packet_max.is_some_and(|max| size > max as usize)
                && !matches!(packet, Packet::Connack(_))
            {
                return Err(format!(
                    "{size} bytes, Maximum Packet Size is less [MQTT-3.1.2-24]: {packet:?}"
                ));
            }
            self.packet(device, link, version, stream, &packet, now)
                .map_err(|e| {
                    format!(
                        "to {}: {}: {e}",
                        self.clients[device].profile.id,
                        short(&packet)
                    )
                })?;
        }
        if at != bytes.len() {
            return Err("half a packet was written".into());
        }
        Ok(())
    }

    /// Judges one packet that the router wrote.
    fn packet(
        &mut self,
        device: usize,
        link: u64,
        version: Version,
        stream: StreamId,
        packet: &Packet<'_>,
        now: Millis,
    ) -> Checked {
        let evicts = self.rules.evicts;
        let c = &mut self.clients[device];
        match packet {
            Packet::Publish(p) => {
                c.wrote_publish(version, stream, p, now)?;
                self.delivered += 1;
                Ok(())
            }
            // MQTT 3.1 has no Session Present.
            Packet::Connack(connack) if version != Version::V31 => {
                match connack.session_present == c.expected_present {
                    true => Ok(()),
                    false => Err("another Session Present than the router's [MQTT-3.2.2-3]".into()),
                }
            }
            Packet::Pubrel(a) if a.reason == ReasonCode::SUCCESS && !evicts => {
                c.ledger.released(a.packet_id)
            }
            Packet::Puback(a) => {
                if self.trace {
                    crate::trace::line(format_args!(
                        "         {} is written {packet:?} on {stream}",
                        c.profile.id
                    ));
                }
                self.inbound
                    .answered(device, stream, a.packet_id, QoS::AtLeastOnce, a.reason)
            }
            Packet::Pubrec(a) => {
                self.inbound
                    .answered(device, stream, a.packet_id, QoS::ExactlyOnce, a.reason)
            }
            Packet::Suback(s) => {
                if self.trace {
                    crate::trace::line(format_args!(
                        "         {} is written {packet:?}",
                        c.profile.id
                    ));
                }
                self.wrote_suback(device, link, stream, s, now)
            }
            Packet::Unsuback(u) => match c.requests.remove(&u.packet_id) {
                Some((on, false, _)) if on == stream => Ok(()),
                _ => Err("UNSUBACK without an UNSUBSCRIBE [MQTT-3.10.4-5]".into()),
            },
            _ => Ok(()),
        }
    }

    /// Judges a SUBACK, and notes what it grants.
    fn wrote_suback(
        &mut self,
        device: usize,
        link: u64,
        stream: StreamId,
        s: &Suback<'_>,
        now: Millis,
    ) -> Checked {
        let hold = self.rules.hold;
        // While the broker is away the router grants a filter as it was asked for.
        let guessed = self.inbound.broker_was_away;
        // When the broker was away longer than the hold time, the router may have granted the filter
        // to another client, and that client may not have heard of the grant.
        let (since, until) = self.away;
        let long = now >= since + hold && until.is_none_or(|until| now < until + RECOVERY);
        let subs = self.clients.iter().flat_map(|c| &c.ledger.subs);
        let doubtful = subs.filter(|s| s.in_doubt);
        let doubtful: Vec<String> = doubtful.map(|s| s.filter.clone()).collect();
        let regained = &self.regained;
        let c = &mut self.clients[device];
        let Some((on, true, names)) = c.requests.remove(&s.packet_id) else {
            return Err("SUBACK without a SUBSCRIBE [MQTT-3.8.4-2]".into());
        };
        if on != stream {
            return Err(format!("SUBACK on stream {stream}, SUBSCRIBE was on {on}"));
        }
        if names.len() != s.codes.len() {
            return Err("SUBACK has another number of codes [MQTT-3.8.4-6]".into());
        }
        c.ledger.answered(link, s.packet_id, now);
        // A filter in doubt for one client is in doubt for all. So is a filter that the broker has
        // lost and not regained.
        let rules = self.rules;
        let lost = |name: &String| {
            let regained = regained.as_ref();
            regained.is_some_and(|r| !r.iter().any(|held| rules.serves(held, name)))
        };
        let doubted = |name: &String| long || doubtful.contains(name) || lost(name);
        for (index, (name, code)) in names.iter().zip(s.codes).enumerate() {
            granted(
                &mut c.ledger,
                link,
                s.packet_id,
                index,
                name,
                *code,
                hold,
                guessed,
                doubted(name),
                now,
            )?;
        }
        Ok(())
    }
}

impl Client {
    /// Notes a SUBSCRIBE that the session took. `number` counts the packets that sessions took.
    /// `in_order`: the data link is there, so that live messages follow retained ones.
    fn subscribes(
        &mut self,
        link: u64,
        stream: StreamId,
        s: &Subscribe<'_>,
        grants: QoS,
        (number, in_order): (u64, bool),
        now: Millis,
    ) {
        let mut names = Vec::new();
        let in_order = in_order && s.filters().count() == 1;
        for (index, (filter, options)) in s.filters().enumerate() {
            names.push(filter.to_owned());
            self.bound.insert((stream, filter.to_owned()));
            let options = SubscribeOptions {
                qos: options.qos.min(grants),
                ..options
            };
            let ask = Ask {
                link,
                packet_id: s.packet_id,
                index,
                options,
                identifier: s.subscription_id.unwrap_or(0),
                at: now,
                number,
            };
            self.asks += 1;
            self.ledger.asked_at.push(now);
            asked(&mut self.ledger, filter, ask, stream, in_order);
        }
        self.requests.insert(s.packet_id, (stream, true, names));
    }

    /// Notes an UNSUBSCRIBE that the session took. `latest` is the latest event of the broker.
    fn unsubscribes(&mut self, stream: StreamId, u: &Unsubscribe<'_>, latest: u64) {
        let names: Vec<String> = u.filters().map(str::to_owned).collect();
        self.ledger.subs.retain(|s| !names.contains(&s.filter));
        self.ledger.left.extend(names.iter().cloned());
        let ended = self.ledger.wants.iter_mut();
        for want in ended.filter(|w| names.contains(&w.filter)) {
            want.until = want.until.min(latest);
        }
        self.requests.insert(u.packet_id, (stream, false, names));
    }

    /// Judges a PUBLISH that the router wrote.
    fn wrote_publish(
        &mut self,
        version: Version,
        stream: StreamId,
        p: &Publish<'_>,
        now: Millis,
    ) -> Checked {
        let topic = match p.topic_alias {
            Some(alias) if p.topic.is_empty() => self.aliases.get(&(stream, alias)).cloned(),
            Some(alias) => {
                self.aliases.insert((stream, alias), p.topic.to_owned());
                Some(p.topic.to_owned())
            }
            None => Some(p.topic.to_owned()),
        };
        let topic = topic.ok_or("an undefined alias")?;
        let asked = |(on, filter): &(StreamId, String)| {
            *on == stream && crate::broker::matching(filter, &topic)
        };
        if !stream.is_control() && !self.bound.iter().any(asked) {
            return Err(format!("nobody subscribed to it on stream {stream}"));
        }
        let key = key(p.payload);
        self.window.now = now;
        self.ledger
            .wrote(&mut self.window, version, stream, &topic, &key, p)
    }
}

/// Notes that the client asked for a filter, and whether it wants the retained messages.
fn asked(ledger: &mut Ledger, filter: &str, ask: Ask, stream: StreamId, in_order: bool) {
    let known = ledger.subs.iter().position(|s| s.filter == filter);
    // Retained messages that an earlier subscription asked for also serve the new one.
    for want in ledger.wants.iter_mut().filter(|w| w.filter == filter) {
        want.until = u64::MAX;
    }
    // The router may have refused a subscription that was never granted, and the client may not
    // have heard of it. Then this subscription is new.
    let granted = |at: usize| ledger.subs[at].granted.is_some();
    let fresh = !known.is_some_and(granted);
    let handling = ask.options.retain_handling;
    if handling == 0 || (handling == 1 && fresh) {
        ledger.wants.push(Want {
            filter: filter.to_owned(),
            got: Default::default(),
            failed: 0,
            until: u64::MAX,
            asked: Some((ask.link, ask.packet_id)),
            stream,
            suback_lost: false,
            asked_at: ask.at,
            suback_at: None,
            in_order,
            live: Default::default(),
        });
    }
    let Some(at) = known else {
        ledger.subs.push(Sub {
            filter: filter.to_owned(),
            granted: None,
            granted_at: None,
            no_local_since: ask.at,
            asked: vec![ask],
            in_doubt: false,
            guessed: false,
        });
        return;
    };
    let sub = &mut ledger.subs[at];
    // The router may have granted or refused each subscription that an earlier connection asked for.
    let hides = sub.asked.iter().all(|a| a.options.no_local);
    let granted = sub.granted.is_some_and(|(_, o, _)| o.no_local);
    let known = granted || sub.asked.iter().any(|a| a.link == ask.link);
    if !hides || !known {
        sub.no_local_since = ask.at;
    }
    sub.asked.push(ask);
}

#[allow(
    clippy::too_many_arguments,
    reason = "one call for each thing that the oracle compares"
)]
fn granted(
    ledger: &mut Ledger,
    link: u64,
    packet_id: u16,
    index: usize,
    name: &str,
    code: u8,
    hold: Duration,
    guessed: bool,
    doubted: bool,
    now: Millis,
) -> Checked {
    let Some(at) = ledger.subs.iter().position(|s| s.filter == name) else {
        return Ok(());
    };
    let sub = &mut ledger.subs[at];
    let ask = sub
        .asked
        .iter()
        .position(|a| a.link == link && a.packet_id == packet_id && a.index == index);
    let Some(ask) = ask.map(|i| sub.asked.remove(i)) else {
        return Ok(());
    };
    // Earlier requests, on an earlier connection too, are replaced.
    sub.asked.retain(|a| a.number > ask.number);
    let Some(granted) = QoS::from_u8(code) else {
        if sub.granted.is_none() && sub.asked.is_empty() {
            ledger.subs.remove(at);
        }
        return Ok(());
    };
    let late = now >= ask.at + hold;
    if granted > ask.options.qos && !late && !guessed {
        return Err(format!(
            "{name} is granted {granted:?}, asked was {:?}",
            ask.options.qos
        ));
    }
    sub.in_doubt |= late || doubted;
    sub.guessed = late || doubted;
    sub.granted = Some((granted, ask.options, ask.identifier));
    sub.granted_at = Some(now);
    Ok(())
}

pub(crate) fn short(packet: &Packet<'_>) -> String {
    match packet {
        Packet::Publish(p) => format!(
            "PUBLISH {} id {} on {:?} {:?} dup {} retain {}",
            key(p.payload),
            p.packet_id,
            p.topic,
            p.qos,
            p.dup,
            p.retain
        ),
        other => format!("{other:?}"),
    }
}
