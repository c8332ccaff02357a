//! The works that are measured.
use std::{
    ffi::{c_char, c_int},
    fs::File,
    hint::black_box,
    io::{BufRead, BufReader, BufWriter, Write},
    sync::Arc,
};

use matrix_sdk_crypto::{OlmMachine, store::MemoryStore, types::events::room::encrypted::EncryptedEvent};
use matrix_sdk_sqlite::SqliteCryptoStore;
use ruma::{
    OwnedRoomId, RoomId, UserId,
    api::{IncomingResponse, client::keys::get_keys},
    device_id,
    exports::http,
    serde::Raw,
};
use rusqlite::ffi;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::{
    crowd,
    meter::{Meter, live_kib, resident_kib},
    parties::{self, Party, first_login, receive, receiver_id, settings, sync_body},
};

const WARM_SESSIONS: usize = 200;
const WARM_MESSAGES: usize = 10;
const FIRST_MESSAGES: usize = 500;
const QUERY_USERS: usize = 1000;
const QUERY_DEVICES: usize = 5;
const USERS_PER_QUERY: usize = 250;

/// What is measured.
pub struct Options {
    /// memory, sqlite-full (what matrix-sdk-sqlite does by itself) or sqlite-normal.
    pub store: String,
    /// How many room keys are received.
    pub keys: usize,
    /// How many of them come in one /sync.
    pub batch: usize,
    /// How many sessions are in the database before.
    pub stored: usize,
}

/// Does a work and prints its figures.
pub async fn run(work: &str, options: Options) {
    if options.store == "sqlite-normal" {
        make_every_connection_normal();
    }
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench { options, dir };
    match work {
        "keys-1" => bench.keys(1).await,
        "keys-200" => bench.keys(200).await,
        "first" => bench.first().await,
        "query" => bench.query().await,
        "memory" => bench.memory().await,
        "stored" => bench.stored().await,
        _ => panic!("there is no work {work}"),
    }
}

/// Has every connection of this process begin with synchronous=NORMAL. matrix-sdk-sqlite has no setting for it: it leaves SQLite's
/// default, FULL.
fn make_every_connection_normal() {
    unsafe extern "C" fn normal(db: *mut ffi::sqlite3, _: *mut *mut c_char, _: *const ffi::sqlite3_api_routines) -> c_int {
        // SAFETY: the connection is open, and the statement ends with a zero.
        unsafe {
            // To set it, the database is read, which another connection may be making.
            ffi::sqlite3_busy_timeout(db, 5000);
            ffi::sqlite3_exec(db, c"PRAGMA synchronous = NORMAL".as_ptr(), None, std::ptr::null_mut(), std::ptr::null_mut())
        }
    }
    // SAFETY: the function has the type that SQLite calls it by.
    unsafe { ffi::sqlite3_auto_extension(Some(normal)) };
}

struct Bench {
    options: Options,
    dir: TempDir,
}

/// The room keys of a run.
struct Keys {
    rooms: Vec<OwnedRoomId>,
    bodies: Vec<Vec<u8>>,
}

impl Bench {
    fn report(&self, mut figure: Map<String, Value>) {
        figure.insert("side".into(), "reference".into());
        figure.insert("store".into(), self.options.store.clone().into());
        if self.options.stored > 0 {
            figure.insert("stored".into(), self.options.stored.into());
        }
        println!("{}", Value::Object(figure));
    }

    async fn machine(&self) -> OlmMachine {
        let (user, device) = (receiver_id(), device_id!("RECEIVER"));
        if self.options.store == "memory" {
            return OlmMachine::with_store(user, device, MemoryStore::new(), None).await.unwrap();
        }
        let store = SqliteCryptoStore::open(self.dir.path(), None).await.unwrap();
        OlmMachine::with_store(user, device, Arc::new(store), None).await.unwrap()
    }

    /// A receiver that knows so many senders, who have Olm sessions with it by which they were answered.
    async fn met(&self, count: usize) -> (Party, Vec<Party>) {
        let senders = parties::senders(count).await;
        let mut receiver = first_login(self.machine().await).await;
        receiver.learn(&senders).await;
        let room = RoomId::parse("!first:bench").unwrap();
        for sender in &senders {
            if receiver.left() == 0 {
                receiver.publish_one_time_keys().await;
            }
            sender.meet(&mut receiver).await;
            let (event, kind) = sender.share(&room).await;
            assert_eq!(kind, 0, "a first message is a pre-key message");
            assert_eq!(receive(&receiver.machine, &sync_body("first", &[event], 50)).await, 1);
            sender.greeted_by(&receiver).await;
        }
        (receiver, senders)
    }

    /// Room keys by the senders in turn, each for a room of its own, and the /sync answers that bring them.
    async fn room_keys(&self, senders: &[Party], count: usize) -> Keys {
        let mut keys = Keys { rooms: Vec::new(), bodies: Vec::new() };
        let mut batch = Vec::new();
        for i in 0..count {
            let room = RoomId::parse(format!("!r{i}:bench")).unwrap();
            let (event, kind) = senders[i % senders.len()].share(&room).await;
            assert_eq!(kind, 1, "the Olm session is in use");
            keys.rooms.push(room);
            batch.push(event);
            if batch.len() == self.options.batch || i == count - 1 {
                keys.bodies.push(sync_body(&format!("t{i}"), &batch, 50));
                batch.clear();
            }
        }
        keys
    }

    async fn keys(self, senders: usize) {
        let (receiver, people) = self.met(senders).await;
        let keys = self.room_keys(&people, self.options.keys).await;
        let bytes: usize = keys.bodies.iter().map(Vec::len).sum();
        let mut meter = Meter::new();
        let mut stored = 0;
        meter.begin();
        for body in &keys.bodies {
            stored += receive(&receiver.machine, body).await;
        }
        meter.end();
        assert_eq!(stored, self.options.keys, "every room key is stored");
        let sessions = receiver.machine.store().get_inbound_group_sessions().await.unwrap();
        let proven = sessions.iter().filter(|session| format!("{:?}", session.sender_data_type()) == "SenderUnverified");
        assert_eq!(proven.count(), stored + senders, "every sender is derived");
        drop(sessions);
        let mut figure = meter.figure(&format!("receive_{senders}"), stored);
        figure.insert("values".into(), json!({"event_bytes": bytes / stored}));
        self.report(figure);
        if senders == 1 {
            self.decrypt(receiver, &people[0], &keys.rooms).await;
        }
    }

    async fn decrypt(&self, receiver: Party, sender: &Party, rooms: &[OwnedRoomId]) {
        let warm = &rooms[..WARM_SESSIONS.min(rooms.len())];
        let messages = messages_of(sender, warm, 0, 1).await;
        decrypt_all(&receiver.machine, &messages, true).await;
        let messages = messages_of(sender, warm, 1, WARM_MESSAGES).await;
        self.decrypt_twice("decrypt_warm", &receiver.machine, &messages).await;
        if self.options.store == "memory" {
            return;
        }
        let messages = messages_of(sender, rooms, WARM_MESSAGES + 1, 1).await;
        drop(receiver);
        let machine = self.machine().await;
        self.decrypt_once("decrypt_cold", &machine, &messages, true).await;
        drop(machine);
        let machine = self.machine().await;
        self.decrypt_once("decrypt_only_cold", &machine, &messages, false).await;
    }

    async fn decrypt_twice(&self, work: &str, machine: &OlmMachine, messages: &[Message]) {
        self.decrypt_once(work, machine, messages, true).await;
        self.decrypt_once(&work.replace("decrypt", "decrypt_only"), machine, messages, false).await;
    }

    async fn decrypt_once(&self, work: &str, machine: &OlmMachine, messages: &[Message], ask_who: bool) {
        let mut meter = Meter::new();
        meter.begin();
        decrypt_all(machine, messages, ask_who).await;
        meter.end();
        self.report(meter.figure(work, messages.len()));
    }

    async fn first(self) {
        let senders = parties::senders(FIRST_MESSAGES).await;
        let mut receiver = first_login(self.machine().await).await;
        receiver.learn(&senders).await;
        let room = RoomId::parse("!first:bench").unwrap();
        let mut meter = Meter::new();
        let mut left = &senders[..];
        while !left.is_empty() {
            if receiver.left() == 0 {
                receiver.publish_one_time_keys().await;
            }
            let (now, later) = left.split_at(receiver.left().min(left.len()));
            left = later;
            let mut events = Vec::new();
            for sender in now {
                sender.meet(&mut receiver).await;
                events.push(sender.share(&room).await.0);
            }
            let body = sync_body(&format!("t{}", left.len()), &events, 50);
            meter.begin();
            let stored = receive(&receiver.machine, &body).await;
            meter.end();
            assert_eq!(stored, now.len(), "every first message is read");
        }
        self.report(meter.figure("first_message", FIRST_MESSAGES));
    }

    async fn query(self) {
        let queries = crowd::queries(QUERY_USERS, QUERY_DEVICES, USERS_PER_QUERY);
        let receiver = first_login(self.machine().await).await;
        receiver.learn([]).await;
        let machine = &receiver.machine;
        let mut meter = Meter::new();
        meter.begin();
        for (users, answer) in &queries {
            let users: Vec<&UserId> = users.iter().map(|user| <&UserId>::try_from(user.as_str()).unwrap()).collect();
            machine.update_tracked_users(users.iter().copied()).await.unwrap();
            let (id, _) = machine.query_keys_for_users(users.iter().copied());
            let answer = get_keys::v3::Response::try_from_http_response(http::Response::new(answer)).unwrap();
            machine.mark_request_as_sent(&id, &answer).await.unwrap();
        }
        meter.end();
        let user = UserId::parse(format!("@sender{}:bench", QUERY_USERS - 1)).unwrap();
        let devices = machine.get_user_devices(&user, None).await.unwrap();
        assert_eq!(devices.devices().filter(|device| device.is_cross_signed_by_owner()).count(), QUERY_DEVICES);
        self.report(meter.figure("key_query", QUERY_USERS * QUERY_DEVICES));
    }

    /// Receives with nothing else in memory: what is received is read from a file.
    async fn memory(self) {
        let (receiver, senders) = self.met(1).await;
        let keys = self.room_keys(&senders, self.options.keys).await;
        let path = self.dir.path().join("bodies");
        let mut file = BufWriter::new(File::create(&path).unwrap());
        for body in &keys.bodies {
            file.write_all(body).unwrap();
            file.write_all(b"\n").unwrap();
        }
        file.into_inner().unwrap();
        drop((keys, senders));
        let mut meter = Meter::new();
        let mut stored = 0;
        meter.begin();
        for body in BufReader::new(File::open(&path).unwrap()).split(b'\n') {
            stored += receive(&receiver.machine, &body.unwrap()).await;
        }
        meter.end();
        assert_eq!(stored, self.options.keys, "every room key is stored");
        let mut figure = meter.figure(&format!("memory_{}", self.options.keys), stored);
        figure.insert("resident_kib".into(), resident_kib().into());
        figure.insert("live_kib".into(), live_kib().into());
        self.report(figure);
    }

    /// Receives, and decrypts, with many sessions in the database: copies of one, under other IDs.
    async fn stored(self) {
        let (receiver, senders) = self.met(1).await;
        self.fill(self.options.stored);
        let keys = self.room_keys(&senders, self.options.keys).await;
        let mut meter = Meter::new();
        meter.begin();
        for body in &keys.bodies {
            receive(&receiver.machine, body).await;
        }
        meter.end();
        self.report(meter.figure("receive_stored", self.options.keys));
        let messages = messages_of(&senders[0], &keys.rooms, 0, 1).await;
        drop(receiver);
        let mut meter = Meter::new();
        meter.begin();
        let machine = self.machine().await;
        meter.end();
        self.report(meter.figure("start_stored", 1));
        self.decrypt_once("decrypt_stored", &machine, &messages, true).await;
    }

    fn fill(&self, count: usize) {
        let file = self.dir.path().join("matrix-sdk-crypto.sqlite3");
        let connection = rusqlite::Connection::open(file).unwrap();
        connection
            .execute(
                "INSERT INTO inbound_group_session (session_id, room_id, backed_up, data, sender_key, sender_data_type)
                 WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM numbers WHERE n<?1)
                 SELECT CAST(substr(hex(randomblob(22)), 1, 43) AS BLOB), CAST('!old' || (n % 1000) || ':bench' AS BLOB),
                        backed_up, data, sender_key, sender_data_type
                 FROM numbers, (SELECT * FROM inbound_group_session LIMIT 1)",
                [count],
            )
            .unwrap();
    }
}

type Message = (OwnedRoomId, Raw<EncryptedEvent>);

/// Messages in the rooms in turn, as a busy account sees them.
async fn messages_of(sender: &Party, rooms: &[OwnedRoomId], from: usize, each: usize) -> Vec<Message> {
    let mut messages = Vec::new();
    for number in from..from + each {
        for room in rooms {
            messages.push((room.clone(), sender.message(room, number).await));
        }
    }
    messages
}

/// Decrypts the messages. What the decryption says of the sender is what is known now; `ask_who` asks for it as a client does that
/// shows a message.
async fn decrypt_all(machine: &OlmMachine, messages: &[Message], ask_who: bool) {
    for (room, message) in messages {
        black_box(machine.decrypt_room_event(message, room, &settings()).await.unwrap());
        if ask_who {
            black_box(machine.get_room_event_encryption_info(message, room).await.unwrap());
        }
    }
}
