//! A client with one session that publishes and subscribes on several streams, ends streams and
//! loses its connections.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tidegate_kit::audit::Stamp;
use tidegate_kit::dial::Dialer;
use tidegate_kit::link::{Abandoned, Cut};
use tidegate_kit::streams::{CONTROL, Event, Streams};
use tidegate_kit::wire::{Connect, Packet, Publish, Subscribe, Unsubscribe};

use super::verdict::Deliveries;
use super::{FLOWS, Resent, Result, World, ack_of, flow_of, flows};
use tidegate_kit::rng::Rng;

/// Publishes of a flow that may be unanswered at once.
const WINDOW: usize = 8;
/// The number of packet identifiers: few, so that each is soon used again, and on another stream.
const IDS: u16 = 100;
/// Deliveries that may be unanswered at once.
const RECEIVE_MAX: u16 = 12;
/// The device sends PINGREQ after this time without a packet.
const KEEP_ALIVE: Duration = Duration::from_millis(200);

const FINISH: usize = 0;
const RESET: usize = 1;
const STOP: usize = 2;
pub(super) const CUT: usize = 3;

/// A device's report at its end.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// The number of streams and connections that it ended, by the way of ending.
    pub ends: [u64; 4],
    /// The publishes of QoS 1 that it sent again, and how often.
    pub resent: Resent,
    pub on_data: u64,
    pub on_control: u64,
    pub again: u64,
}

impl Report {
    pub(super) fn add(&mut self, other: Self) {
        for (all, its) in self.ends.iter_mut().zip(other.ends) {
            *all += its;
        }
        self.resent.extend(other.resent);
        self.on_data += other.on_data;
        self.on_control += other.on_control;
        self.again += other.again;
    }
}

/// One of the device's publishes, not yet completed.
#[derive(Debug)]
struct Open {
    id: u16,
    qos: u8,
    seq: u64,
    /// The stream on which the publish, or its PUBREL, was sent last: the answer comes there.
    on: u32,
    /// Whether PUBREC has arrived.
    received: bool,
    /// Whether the publish was sent more than once.
    again: bool,
}

/// Publishes in order, on one stream at a time.
#[derive(Debug, Default)]
struct Flow {
    stream: u32,
    /// The stream was ended, and the server must confirm that before another stream carries on:
    /// streams are not ordered among each other.
    waits: bool,
    sent: [u64; 2],
    open: VecDeque<Open>,
}

/// A subscription, and the stream on which it was made.
#[derive(Debug, Default)]
struct Filter {
    stream: u32,
    /// The packet identifier of the unanswered SUBSCRIBE.
    asked: Option<u16>,
}

pub(super) struct Device {
    number: u32,
    /// Messages of each flow at each QoS.
    count: u64,
    dialer: Arc<Dialer>,
    world: Arc<World>,
    rng: Rng,
    streams: Streams,
    abandoned: Option<Abandoned>,
    flows: Vec<Flow>,
    filters: Vec<Filter>,
    /// Streams that the device has ended and the server has not.
    ended: BTreeSet<u32>,
    deliveries: Deliveries,
    /// Unanswered UNSUBSCRIBEs by packet identifier, with their streams. They serve as barriers,
    /// since PINGREQ belongs on the control stream.
    markers: HashMap<u16, u32>,
    /// PINGREQs of this connection, and their answers.
    pings: u64,
    pongs: u64,
    last_id: u16,
    /// The number of packets until the device ends a stream or its connection.
    packets: u64,
    /// The time during which the server has sent only PINGRESPs.
    silent: Duration,
    report: Report,
}

fn connect(number: u32) -> Connect {
    let connect = Connect::new(format!("device-{number}"));
    let connect = connect.clean(false).expiry(300);
    connect.receive_max(RECEIVE_MAX)
}

impl Device {
    /// Connects and subscribes.
    pub(super) async fn connect(
        number: u32,
        count: u64,
        dialer: Arc<Dialer>,
        world: Arc<World>,
        rng: Rng,
    ) -> Result<Self> {
        let (streams, _) = Streams::connect(&dialer, &connect(number)).await?;
        let mut device = Self {
            number,
            count,
            dialer,
            world,
            rng,
            streams,
            abandoned: None,
            flows: (0..FLOWS).map(|_| Flow::default()).collect(),
            filters: (0..FLOWS).map(|_| Filter::default()).collect(),
            ended: BTreeSet::new(),
            deliveries: Deliveries::default(),
            markers: HashMap::new(),
            pings: 0,
            pongs: 0,
            last_id: 0,
            packets: 50,
            silent: Duration::ZERO,
            report: Report::default(),
        };
        device.begin().await?;
        while device.filters.iter().any(|f| f.asked.is_some()) {
            device.step().await?;
        }
        Ok(device)
    }

    /// Runs until all messages have come and gone; an error lists the missing ones.
    pub(super) async fn run(mut self) -> Result<Report> {
        match self.live().await {
            Ok(()) => {
                self.report.on_data = self.deliveries.on_data;
                self.report.on_control = self.deliveries.on_control;
                self.report.again = self.deliveries.again;
                Ok(self.report)
            }
            Err(error) => {
                let missing = flows(self.number..self.number + 1)
                    .map(|flow| (flow, self.deliveries.missing(flow, self.count)));
                let missing: Vec<_> = missing.collect();
                let (number, ends) = (self.number, self.report.ends);
                let (flows, ended) = (&self.flows, &self.ended);
                Err(format!(
                    "device {number} after {ends:?}: {error}; misses {missing:?}; {flows:?}; {:?}; \
                     ended {ended:?}",
                    self.filters
                )
                .into())
            }
        }
    }

    async fn live(&mut self) -> Result {
        while !self.done() {
            self.step().await?;
            if self.packets == 0 {
                self.disturb().await?;
                self.packets = self.rng.between(20, 80);
            }
        }
        // After this no other packet is on its way.
        self.settle().await
    }

    /// Takes all packets that the server has sent. Messages lost with an ended stream come again,
    /// and come before newer ones.
    async fn settle(&mut self) -> Result {
        while !self.ended.is_empty() {
            self.step().await?;
        }
        // Messages sent from now on may overtake queued ones.
        let last = self.deliveries.last();
        for stream in self.data_streams() {
            let id = self.new_id();
            let unsubscribe = Unsubscribe {
                id,
                filters: vec!["marker".to_owned()],
                ..Unsubscribe::default()
            };
            let unsubscribe = Packet::Unsubscribe(unsubscribe);
            self.streams.queue(stream, &unsubscribe);
            self.markers.insert(id, stream);
        }
        self.ping();
        let pings = self.pings;
        while !self.markers.is_empty() || self.pongs < pings {
            self.step().await?;
        }
        self.deliveries.gapless(&last).map_err(Into::into)
    }

    fn done(&self) -> bool {
        let said = |f: &Flow| f.sent == [self.count; 2] && f.open.is_empty();
        let all = flows(self.number..self.number + 1);
        self.ended.is_empty()
            && self.flows.iter().all(said)
            && self.deliveries.complete(all, self.count)
    }

    /// Begins on a new connection: sends all open publishes again and subscribes, on new streams.
    async fn begin(&mut self) -> Result {
        self.deliveries.connected();
        self.ended.clear();
        (self.pings, self.pongs) = (0, 0);
        for flow in 0..FLOWS {
            let Flow { stream, open, .. } = &mut self.flows[flow];
            // Packets sent on the control stream are lost as well.
            open.iter_mut().for_each(|open| open.on = *stream);
            self.carry_on(flow).await?;
        }
        for filter in 0..FLOWS {
            self.subscribe(filter).await?;
        }
        Ok(())
    }

    /// Continues a flow on a new stream: sends its unanswered packets again.
    async fn carry_on(&mut self, flow: usize) -> Result {
        let before = self.flows[flow].stream;
        let stream = self.streams.open().await?;
        self.flows[flow].stream = stream;
        self.flows[flow].waits = false;
        for at in 0..self.flows[flow].open.len() {
            let open = &mut self.flows[flow].open[at];
            if open.on != before {
                // PUBREL was sent on another stream and is still on its way there.
                continue;
            }
            (open.on, open.again) = (stream, true);
            if open.qos == 1 {
                let message = (flow_of(self.number, flow, 1), open.seq);
                *self.report.resent.entry(message).or_default() += 1;
            }
            let open = &self.flows[flow].open[at];
            let packet = match open.received {
                true => Packet::PubRel(ack_of(open.id)),
                false => Packet::Publish(self.message(flow, open, true)),
            };
            self.streams.queue(stream, &packet);
        }
        Ok(())
    }

    /// Subscribes, on a new stream or on the stream of a publishing flow.
    async fn subscribe(&mut self, filter: usize) -> Result {
        let lent = &self.flows[self.rng.below(FLOWS as u64) as usize];
        let stream = match !lent.waits && self.rng.chance(50) {
            true => lent.stream,
            false => self.streams.open().await?,
        };
        let id = self.new_id();
        let flow = self.number as usize * FLOWS + filter;
        let subscribe = Subscribe {
            id,
            filters: vec![(format!("down/{flow}/+"), 2)],
            ..Subscribe::default()
        };
        self.streams.queue(stream, &Packet::Subscribe(subscribe));
        self.filters[filter] = Filter {
            stream,
            asked: Some(id),
        };
        Ok(())
    }

    /// A packet identifier that is unused on all streams, as from a client with one table of
    /// identifiers.
    fn new_id(&mut self) -> u16 {
        loop {
            self.last_id = self.last_id % IDS + 1;
            let id = self.last_id;
            let publishes = self.flows.iter().flat_map(|f| &f.open).any(|o| o.id == id);
            let asked = self.filters.iter().any(|f| f.asked == Some(id));
            if !publishes && !asked && !self.markers.contains_key(&id) {
                return id;
            }
        }
    }

    fn message(&self, flow: usize, open: &Open, dup: bool) -> Publish {
        let stamp = Stamp {
            stream: flow_of(self.number, flow, open.qos),
            seq: open.seq,
            sent_ns: 0,
        };
        Publish {
            dup,
            qos: open.qos,
            topic: format!("up/{}/{}", stamp.stream / 2, open.qos),
            id: open.id,
            payload: stamp.payload(200),
            ..Publish::default()
        }
    }

    fn say(&mut self) {
        for flow in 0..FLOWS {
            while !self.flows[flow].waits && self.flows[flow].open.len() < WINDOW {
                let [one, two] = self.flows[flow].sent;
                let qos = 1 + u8::from(two < one);
                let seq = self.flows[flow].sent[usize::from(qos) - 1] + 1;
                if seq > self.count {
                    break;
                }
                let on = self.flows[flow].stream;
                let open = Open {
                    id: self.new_id(),
                    qos,
                    seq,
                    on,
                    received: false,
                    again: false,
                };
                let packet = Packet::Publish(self.message(flow, &open, false));
                self.streams.queue(on, &packet);
                self.flows[flow].sent[usize::from(qos) - 1] = seq;
                self.flows[flow].open.push_back(open);
            }
        }
    }

    /// Sends as much as the windows allow, and handles one event.
    async fn step(&mut self) -> Result {
        self.say();
        let Some((stream, event)) = self.streams.next_within(KEEP_ALIVE).await? else {
            // The server learns a client's new address only from packets that the client sends.
            self.ping();
            self.silent += KEEP_ALIVE;
            return match self.silent > super::super::SOON {
                true => Err("no packet arrives any more".into()),
                false => Ok(()),
            };
        };
        if !matches!(event, Event::Packet(Packet::PingResp)) {
            self.silent = Duration::ZERO;
            self.packets = self.packets.saturating_sub(1);
        }
        self.take(stream, event).await
    }

    fn ping(&mut self) {
        self.pings += 1;
        self.streams.queue(CONTROL, &Packet::PingReq);
    }

    /// Data streams that the device has not ended.
    fn data_streams(&mut self) -> Vec<u32> {
        let used = self.flows.iter().map(|f| f.stream);
        let used = used.chain(self.filters.iter().map(|f| f.stream));
        let used: BTreeSet<u32> = used.collect();
        let open =
            |s: &u32| *s != CONTROL && !self.ended.contains(s) && self.streams.on(*s).is_some();
        used.into_iter().filter(open).collect()
    }

    async fn take(&mut self, stream: u32, event: Event) -> Result {
        let packet = match event {
            Event::Packet(packet) => packet,
            Event::Gone => return self.gone(stream).await,
        };
        let wrong = |what: &str, packet: &dyn std::fmt::Debug| {
            let what = format!("{packet:?} on stream {stream}: {what}");
            Err(what.into())
        };
        match packet {
            Packet::Publish(publish) => {
                let fresh = self.deliveries.fresh;
                if self.deliveries.take(stream, &publish)? {
                    let fresh = self.deliveries.fresh - fresh;
                    self.world.pace.add_permits(fresh);
                    let stamp = Stamp::read(&publish.payload).ok_or("the payload has no stamp")?;
                    let filter = &self.filters[stamp.stream as usize / 2 % FLOWS];
                    if stream != CONTROL && stream != filter.stream {
                        return wrong("the filter was not subscribed on this stream", &publish);
                    }
                    let answer = match publish.qos {
                        1 => Packet::PubAck(ack_of(publish.id)),
                        _ => Packet::PubRec(ack_of(publish.id)),
                    };
                    self.streams.queue(stream, &answer);
                }
            }
            Packet::PubRel(ack) => {
                self.deliveries.released(ack.id);
                // On an ended stream the device can send no answer; PUBREL comes again on another
                // stream.
                if !self.ended.contains(&stream) {
                    let answer = Packet::PubComp(ack_of(ack.id));
                    self.streams.queue(stream, &answer);
                }
            }
            Packet::PubRec(ref ack) if ack.code < 0x80 => {
                let elsewhere = self.ended.contains(&stream);
                let on_control = elsewhere && self.rng.chance(50);
                let Some(open) = self.find(ack.id, 2).filter(|open| open.on == stream) else {
                    return wrong("no publish waits for it on this stream", &packet);
                };
                open.received = true;
                if on_control {
                    open.on = CONTROL;
                }
                let on = open.on;
                if !elsewhere || on_control {
                    self.streams.queue(on, &Packet::PubRel(ack_of(ack.id)));
                }
            }
            Packet::PubAck(ref ack) if ack.code < 0x80 => {
                match self.find(ack.id, 1).map(|open| open.on) {
                    Some(on) if on == stream => self.answered(ack.id),
                    _ => return wrong("no publish waits for it on this stream", &packet),
                }
            }
            Packet::PubComp(ref ack) if matches!(ack.code, 0 | 0x92) => {
                match self.find(ack.id, 2) {
                    Some(open) if open.on == stream && open.received => {
                        if ack.code != 0 && !open.again {
                            return wrong("the publish had been released only once", &packet);
                        }
                    }
                    _ => return wrong("no publish waits for it on this stream", &packet),
                }
                self.answered(ack.id);
            }
            Packet::SubAck(ref codes) => {
                let asked = |f: &&mut Filter| f.asked == Some(codes.id) && f.stream == stream;
                match self.filters.iter_mut().find(asked) {
                    Some(filter) if codes.codes == [2] => filter.asked = None,
                    _ => return wrong("it does not answer a request on this stream", &packet),
                }
            }
            Packet::UnsubAck(ref codes) => {
                if self.markers.remove(&codes.id) != Some(stream) {
                    return wrong("it does not answer a request on this stream", &packet);
                }
            }
            Packet::PingResp if stream == CONTROL => self.pongs += 1,
            other => return wrong("unexpected", &other),
        }
        Ok(())
    }

    fn find(&mut self, id: u16, qos: u8) -> Option<&mut Open> {
        let mut open = self.flows.iter_mut().flat_map(|f| &mut f.open);
        open.find(|o| o.id == id && o.qos == qos)
    }

    fn answered(&mut self, id: u16) {
        for flow in &mut self.flows {
            flow.open.retain(|o| o.id != id);
        }
    }

    /// The server has noticed the end of a stream: its flow and its filter continue on other
    /// streams.
    async fn gone(&mut self, stream: u32) -> Result {
        if !self.ended.remove(&stream) {
            return Err(format!("stream {stream} was ended by the server").into());
        }
        for flow in 0..FLOWS {
            if self.flows[flow].stream == stream {
                self.carry_on(flow).await?;
            }
        }
        for filter in 0..FLOWS {
            if self.filters[filter].stream == stream {
                // The SUBSCRIBE may be lost with its stream.
                self.filters[filter].asked = None;
                // Some filters stay on control for a while.
                if self.rng.chance(75) {
                    self.subscribe(filter).await?;
                }
            }
        }
        Ok(())
    }

    async fn disturb(&mut self) -> Result {
        let ends = self.report.ends.iter().sum::<u64>();
        let what = ends as usize % self.report.ends.len();
        self.report.ends[what] += 1;
        if self.number == 0 && ends % 2 == 1 {
            self.world.network.write().await.rebind();
        }
        if what == CUT {
            if self.rng.chance(50) {
                self.settle().await?;
            }
            return self.flap().await;
        }
        let used = self.data_streams();
        if used.is_empty() {
            return Ok(());
        }
        let stream = self.rng.pick(&used);
        match what {
            FINISH => self.streams.finish(stream).await?,
            RESET => self.streams.reset(stream, 31)?,
            STOP => self.streams.stop(stream, 31)?,
            other => return Err(format!("no way to end a stream: {other}").into()),
        }
        self.ended.insert(stream);
        self.deliveries.ended(stream);
        for flow in self.flows.iter_mut().filter(|f| f.stream == stream) {
            flow.waits = true;
        }
        // Subscribe again to filters that stayed on control.
        for filter in 0..FLOWS {
            let on = self.filters[filter].stream;
            if self.streams.on(on).is_none() && !self.ended.contains(&on) {
                self.subscribe(filter).await?;
            }
        }
        Ok(())
    }

    /// Takes the session over on a new connection and breaks the old one off.
    async fn flap(&mut self) -> Result {
        let world = self.world.clone();
        let connecting = world.network.read().await;
        let (streams, ack) = Streams::connect(&self.dialer, &connect(self.number)).await?;
        drop(connecting);
        if !ack.session_present {
            return Err("the session was not present".into());
        }
        let how = self.rng.pick(&[Cut::Silent, Cut::Reset]);
        self.abandoned = Some(std::mem::replace(&mut self.streams, streams).cut(how));
        for filter in &mut self.filters {
            filter.asked = None;
        }
        self.begin().await
    }
}
