//! The oracle's view of packets: what a session took, and what it wrote.

use tidegate::mqtt::{Decoder, Packet, QoS, ReasonCode, Receiver, SubscribeOptions, Version};
use tidegate::time::Millis;

use crate::ledger::{Ask, Ledger, Sub, Want};
use crate::oracle::{Checked, Oracle, key};

impl Oracle {
    /// A packet of the client was taken by its session.
    pub fn took(&mut self, device: usize, stream: u8, packet: &Packet<'_>, now: Millis) {
        let (grants, expiry_max) = (self.rules.grants, self.rules.expiry_max);
        let latest = self.latest;
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
                    eprintln!("         {id} on {stream}, link {link}: {}", short(packet));
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
                let mut names = Vec::new();
                for (index, (filter, options)) in s.filters().enumerate() {
                    names.push(filter.to_owned());
                    c.bound.insert((stream, filter.to_owned()));
                    let options = SubscribeOptions {
                        qos: options.qos.min(grants),
                        ..options
                    };
                    let known = c.ledger.subs.iter().position(|s| s.filter == filter);
                    let ask = Ask {
                        link,
                        packet_id: s.packet_id,
                        index,
                        options,
                        identifier: s.subscription_id.unwrap_or(0),
                        at: now,
                        number,
                    };
                    // Wishes of an earlier subscription serve the new one.
                    for want in c.ledger.wants.iter_mut().filter(|w| w.filter == filter) {
                        want.until = u64::MAX;
                    }
                    // One that was never granted may have been refused unheard: then this is new.
                    let granted = |at: usize| c.ledger.subs[at].granted.is_some();
                    let fresh = !known.is_some_and(granted);
                    if options.retain_handling == 0 || (options.retain_handling == 1 && fresh) {
                        c.ledger.wants.push(Want {
                            filter: filter.to_owned(),
                            got: Default::default(),
                            failed: 0,
                            until: u64::MAX,
                        });
                    }
                    if let Some(at) = known {
                        let sub = &mut c.ledger.subs[at];
                        let before = sub.asked.last().map(|a| a.options);
                        let before = before.or(sub.granted.map(|(_, o, _)| o));
                        if before.is_none_or(|o| !o.no_local) {
                            sub.no_local_since = now;
                        }
                    }
                    match known {
                        Some(at) => c.ledger.subs[at].asked.push(ask),
                        None => c.ledger.subs.push(Sub {
                            filter: filter.to_owned(),
                            granted: None,
                            asked: vec![ask],
                            no_local_since: now,
                            in_doubt: false,
                            guessed: false,
                        }),
                    }
                }
                c.requests.insert(s.packet_id, (stream, true, names));
            }
            Packet::Unsubscribe(u) => {
                let names: Vec<String> = u.filters().map(str::to_owned).collect();
                c.ledger.subs.retain(|s| !names.contains(&s.filter));
                c.ledger.left.extend(names.iter().cloned());
                let ended = c.ledger.wants.iter_mut();
                for want in ended.filter(|w| names.contains(&w.filter)) {
                    want.until = want.until.min(latest);
                }
                c.requests.insert(u.packet_id, (stream, false, names));
            }
            Packet::Disconnect(d) => {
                if let Some(expiry) = d.session_expiry {
                    c.expiry = expiry.min(expiry_max);
                }
            }
            _ => {}
        }
    }

    /// Bytes that the router wrote for the connection.
    pub fn wrote(
        &mut self,
        device: usize,
        link: u64,
        stream: u8,
        bytes: &[u8],
        now: Millis,
    ) -> Checked {
        let c = &self.clients[device];
        if c.attached != Some(link) {
            return Ok(());
        }
        let version = c.profile.version;
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

    fn packet(
        &mut self,
        device: usize,
        link: u64,
        version: Version,
        stream: u8,
        packet: &Packet<'_>,
        now: Millis,
    ) -> Checked {
        let hold = self.rules.hold;
        let evicts = self.rules.evicts;
        // While the core is away a filter is granted as it was asked for.
        let guessed = self.inbound.core_was_away;
        // Long enough away, it may have been granted to somebody who did not hear of it.
        let long = now >= self.away.0 + hold && now < self.away.1.saturating_add(5000);
        let doubtful: Vec<String> = match packet {
            Packet::Suback(_) => {
                let subs = self.clients.iter().flat_map(|c| &c.ledger.subs);
                let subs = subs.filter(|s| s.in_doubt);
                subs.map(|s| s.filter.clone()).collect()
            }
            _ => Vec::new(),
        };
        let regained = &self.regained;
        let c = &mut self.clients[device];
        match packet {
            Packet::Publish(p) => {
                let topic = match p.topic_alias {
                    Some(alias) if p.topic.is_empty() => c.aliases.get(&(stream, alias)).cloned(),
                    Some(alias) => {
                        c.aliases.insert((stream, alias), p.topic.to_owned());
                        Some(p.topic.to_owned())
                    }
                    None => Some(p.topic.to_owned()),
                };
                let topic = topic.ok_or("an undefined alias")?;
                let asked = |(on, filter): &(u8, String)| {
                    *on == stream && crate::core::matching(filter, &topic)
                };
                if stream != 0 && !c.bound.iter().any(asked) {
                    return Err(format!("nobody subscribed to it on stream {stream}"));
                }
                let key = key(p.payload);
                c.ledger
                    .wrote(&mut c.window, version, stream, &topic, &key, p)?;
                self.delivered += 1;
                Ok(())
            }
            // MQTT 3.1 has no Session Present.
            Packet::Connack(c) if version != Version::V31 => {
                match c.session_present == self.clients[device].expected_present {
                    true => Ok(()),
                    false => Err("another Session Present than the router's [MQTT-3.2.2-3]".into()),
                }
            }
            Packet::Pubrel(a) if a.reason == ReasonCode::SUCCESS && !evicts => {
                c.ledger.released(a.packet_id)
            }
            Packet::Puback(a) => {
                if self.trace {
                    eprintln!(
                        "         {} is written {packet:?} on {stream}",
                        c.profile.id
                    );
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
                    eprintln!("         {} is written {packet:?}", c.profile.id);
                }
                let Some((on, true, names)) = c.requests.remove(&s.packet_id) else {
                    return Err("SUBACK without a SUBSCRIBE [MQTT-3.8.4-2]".into());
                };
                if on != stream {
                    return Err(format!("SUBACK on stream {stream}, SUBSCRIBE was on {on}"));
                }
                if names.len() != s.codes.len() {
                    return Err("SUBACK has another number of codes [MQTT-3.8.4-6]".into());
                }
                // What one was granted without the core, another is too; and so is what the core
                // has held and lost.
                let lost = |name: &String| regained.as_ref().is_some_and(|r| !r.contains(name));
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
            Packet::Unsuback(u) => match c.requests.remove(&u.packet_id) {
                Some((on, false, _)) if on == stream => Ok(()),
                _ => Err("UNSUBACK without an UNSUBSCRIBE [MQTT-3.10.4-5]".into()),
            },
            _ => Ok(()),
        }
    }
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
    hold: u64,
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
    // What was asked before it, on an earlier connection too, is replaced.
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
    Ok(())
}

pub fn short(packet: &Packet<'_>) -> String {
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
