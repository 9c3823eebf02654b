//! What the oracle sees of one connection: the packets that the machine took, its output, and whether it
//! keeps its deadlines.

use tidegate::client::End;
use tidegate::client::machine::StreamReset;
use tidegate::mqtt::{Decoder, Packet, Receiver};
use tidegate::router::Router;
use tidegate::streams::{StreamId, StreamSet};
use tidegate::telemetry::DisconnectReason;
use tidegate::time::Millis;

use crate::edge::{Edge, LATE_MAX, PACKET_DEADLINE};
use crate::oracle::{Checked, Oracle};

impl Edge {
    /// Tells the oracle which packets the machine took.
    pub(super) fn judge_taken(
        &mut self,
        result: Result<Option<StreamReset>, End>,
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Checked {
        let Some(machine) = &self.machine else {
            return Ok(());
        };
        let decoder = Decoder {
            version: self.version,
            receiver: Receiver::Server,
            max: u32::MAX,
        };
        for (stream, judged) in &mut self.streams {
            let took = match &result {
                Ok(_) => judged.input.len() - machine.untaken(*stream),
                Err(end) if end.is_by_client() && stream.is_control() => judged.input.len(),
                // The connection has no session any more.
                Err(_) => 0,
            };
            let mut at = 0;
            while at < took {
                let next = decoder.next(&judged.input[at..took]);
                let Some((packet, size)) = next.map_err(|e| e.to_string())? else {
                    return Err("the machine took a part of a packet".into());
                };
                at += size;
                oracle.took(self.device, *stream, &packet, now);
                if matches!(packet, Packet::Disconnect(_)) {
                    break;
                }
            }
            judged.input.drain(..at);
            if at > 0 {
                judged.since = now;
                // The router may have asked for the end before that.
                if machine.handle().closing().is_none() {
                    self.last_in = now;
                }
            }
        }
        match result {
            Ok(reset) => {
                self.reset(reset, oracle);
                Ok(())
            }
            Err(end) => self.end(end, router, oracle, now),
        }
    }

    /// A client's silence ends its connection at one and a half times Keep Alive.
    pub(super) fn judge_silence(&self, end: Option<&End>, now: Millis) -> Checked {
        let silence = now.since(self.last_in);
        let kept = end.is_some_and(|end| end.label() == DisconnectReason::KeepAlive);
        let early = kept && self.patience.is_some_and(|patience| silence < patience);
        let late = self.patience.filter(|_| end.is_none());
        let late = late.is_some_and(|patience| silence > patience + LATE_MAX);
        match early || late {
            false => Ok(()),
            true => Err(format!(
                "silent for {silence:?} of {:?}, closed: {end:?} [MQTT-3.1.2-22]",
                self.patience
            )),
        }
    }

    /// Shows the oracle what the session wrote.
    pub(super) fn judge_output(&mut self, oracle: &mut Oracle, now: Millis) -> Checked {
        let Some(machine) = &mut self.machine else {
            return Ok(());
        };
        let streams = machine.streams() | StreamSet::CONTROL;
        for stream in streams.iter() {
            let judged = self.streams.entry(stream).or_default();
            let output = machine.output(stream).to_vec();
            let fresh = &output[judged.output..];
            let fresh = &fresh[judged.ahead.min(fresh.len())..];
            oracle.wrote(self.device, self.link, stream, fresh, now)?;
            if judged.output < output.len() {
                judged.ahead = 0;
            }
            judged.output = output.len();
        }
        Ok(())
    }

    /// A packet that is read is complete within its deadline, or the connection ends.
    pub(super) fn judge_incomplete(&self, now: Millis) -> Checked {
        let mut streams = self.streams.iter();
        let late = streams.find(|(number, judged)| {
            let read = !self.unread.contains(**number);
            read && !judged.input.is_empty() && now > judged.since + PACKET_DEADLINE + LATE_MAX
        });
        match late {
            None => Ok(()),
            Some((stream, judged)) => Err(format!(
                "a packet on stream {stream} is incomplete since {} ms",
                judged.since
            )),
        }
    }

    /// A stream or a connection that ends for an incomplete packet had its time.
    pub(super) fn judge_late(&self, stream: StreamId, now: Millis) -> Checked {
        let since = self.streams.get(&stream).map_or(now, |j| j.since);
        match now >= since + PACKET_DEADLINE {
            true => Ok(()),
            false => Err(format!("a packet since {since} ms is said to be late")),
        }
    }

    /// Shows the oracle what the session wrote for a data stream and the machine did not take yet.
    pub(super) fn look_ahead(
        &mut self,
        stream: StreamId,
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Checked {
        let Some(machine) = &self.machine else {
            return Ok(());
        };
        let caller = machine.caller();
        let rest = router.with(caller.session, caller.connection_no, |s, _| {
            let writes = stream.is_control() || s.stream_busy(stream);
            let connection = s.connection().filter(|_| writes);
            connection.map(|c| c.outbuf_on(stream).to_vec())
        });
        let judged = self.streams.entry(stream).or_default();
        if let Some(bytes) = rest.flatten() {
            let fresh = &bytes[judged.ahead..];
            oracle.wrote(self.device, self.link, stream, fresh, now)?;
            judged.ahead = bytes.len();
        }
        Ok(())
    }

    /// What the session wrote and nobody took yet; before it is thrown away.
    pub(crate) fn peek(&mut self, router: &Router, oracle: &mut Oracle, now: Millis) -> Checked {
        let streams = self.streams.keys().copied();
        let streams: Vec<StreamId> = streams.chain([StreamId::CONTROL]).collect();
        for stream in streams {
            self.look_ahead(stream, router, oracle, now)?;
        }
        Ok(())
    }
}
