//! Those who send, and the homeserver's answers.
use std::{collections::BTreeMap, iter};

use matrix_sdk_crypto::{
    CollectStrategy, DecryptionSettings, EncryptionSettings, EncryptionSyncChanges, OlmMachine, TrustRequirement,
    types::{
        events::room::encrypted::EncryptedEvent,
        requests::{AnyIncomingResponse, AnyOutgoingRequest, UploadSigningKeysRequest},
    },
};
use ruma::{
    OneTimeKeyAlgorithm, OwnedOneTimeKeyId, OwnedUserId, RoomId, TransactionId, UInt, UserId,
    api::{
        IncomingResponse,
        client::{
            keys::{claim_keys, get_keys, upload_keys, upload_signatures, upload_signing_keys},
            sync::sync_events,
            to_device::send_event_to_device::v3::Response as ToDeviceResponse,
        },
    },
    device_id,
    encryption::{CrossSigningKey, DeviceKeys, OneTimeKey},
    events::AnyMessageLikeEventContent,
    exports::http,
    serde::Raw,
    user_id,
};
use serde_json::{Value, json, value::to_raw_value};

/// The receiver's user ID. Its device is RECEIVER.
pub fn receiver_id() -> &'static UserId {
    user_id!("@receiver:bench")
}

/// A machine with what it has published.
pub struct Party {
    pub machine: OlmMachine,
    device_keys: Raw<DeviceKeys>,
    one_time_keys: BTreeMap<OwnedOneTimeKeyId, Raw<OneTimeKey>>,
    signing: UploadSigningKeysRequest,
}

/// A first login: a new cross-signing identity, which signs the device. The server's answers are made up.
pub async fn first_login(machine: OlmMachine) -> Party {
    let bootstrap = machine.bootstrap_cross_signing(true).await.unwrap();
    let request = bootstrap.upload_keys_req.expect("a first login publishes keys");
    let AnyOutgoingRequest::KeysUpload(upload) = request.request() else { panic!("keys are published by an upload") };
    let upload = upload.clone();
    let answer = upload_keys::v3::Response::new(key_count(upload.one_time_keys.len()));
    machine.mark_request_as_sent(request.request_id(), &answer).await.unwrap();
    let id = TransactionId::new();
    let answer = upload_signing_keys::v3::Response::new();
    machine.mark_request_as_sent(&id, AnyIncomingResponse::SigningKeysUpload(&answer)).await.unwrap();
    machine.mark_request_as_sent(&id, &upload_signatures::v3::Response::new()).await.unwrap();
    Party {
        machine,
        device_keys: upload.device_keys.expect("a first upload has device keys"),
        one_time_keys: upload.one_time_keys,
        signing: bootstrap.upload_signing_keys_req,
    }
}

fn key_count(count: usize) -> BTreeMap<OneTimeKeyAlgorithm, UInt> {
    BTreeMap::from([(OneTimeKeyAlgorithm::SignedCurve25519, UInt::try_from(count).unwrap())])
}

/// People who send to the receiver, each with one device, cross-signed.
pub async fn senders(count: usize) -> Vec<Party> {
    let mut made = Vec::with_capacity(count);
    for i in 0..count {
        let user = UserId::parse(format!("@sender{i}:bench")).unwrap();
        made.push(first_login(OlmMachine::new(&user, device_id!("DEVICE0000")).await).await);
    }
    made
}

fn raw(key: &impl serde::Serialize) -> Raw<CrossSigningKey> {
    Raw::from_json(to_raw_value(key).unwrap())
}

impl Party {
    /// Puts what the account publishes into the answer to a key query.
    fn publish(&self, answer: &mut get_keys::v3::Response, asker: &UserId) {
        let user = self.machine.user_id().to_owned();
        let device = self.machine.device_id().to_owned();
        answer.device_keys.entry(user.clone()).or_default().insert(device, self.device_keys.clone());
        answer.master_keys.insert(user.clone(), raw(self.signing.master_key.as_ref().unwrap()));
        answer.self_signing_keys.insert(user.clone(), raw(self.signing.self_signing_key.as_ref().unwrap()));
        if user == asker {
            answer.user_signing_keys.insert(user, raw(self.signing.user_signing_key.as_ref().unwrap()));
        }
    }

    /// Has the account ask for what these people publish.
    pub async fn learn(&self, people: impl IntoIterator<Item = &Party>) {
        let mut answer = get_keys::v3::Response::new();
        self.publish(&mut answer, self.machine.user_id());
        let mut users: Vec<OwnedUserId> = vec![self.machine.user_id().to_owned()];
        for person in people {
            person.publish(&mut answer, self.machine.user_id());
            users.push(person.machine.user_id().to_owned());
        }
        self.machine.update_tracked_users(users.iter().map(AsRef::as_ref)).await.unwrap();
        let (id, _) = self.machine.query_keys_for_users(users.iter().map(AsRef::as_ref));
        self.machine.mark_request_as_sent(&id, &answer).await.unwrap();
    }

    /// How many one-time keys nobody has claimed.
    pub fn left(&self) -> usize {
        self.one_time_keys.len()
    }

    /// Publishes as many new one-time keys as the machine wants to have, when none is left.
    pub async fn publish_one_time_keys(&mut self) {
        receive(&self.machine, &sync_body("otk", &[], 0)).await;
        for request in self.machine.outgoing_requests().await.unwrap() {
            if let AnyOutgoingRequest::KeysUpload(upload) = request.request() {
                self.one_time_keys = upload.one_time_keys.clone();
                let answer = upload_keys::v3::Response::new(key_count(self.one_time_keys.len()));
                self.machine.mark_request_as_sent(request.request_id(), &answer).await.unwrap();
            }
        }
        assert!(self.left() > 0, "the receiver publishes one-time keys");
    }

    /// Begins an Olm session with the receiver, by one of its one-time keys.
    pub async fn meet(&self, receiver: &mut Party) {
        self.learn(iter::once(&*receiver)).await;
        let (id, _) =
            self.machine.get_missing_sessions(iter::once(receiver_id())).await.unwrap().expect("there is no Olm session yet");
        let key = receiver.one_time_keys.pop_first().expect("the receiver has one-time keys");
        let of_device = BTreeMap::from([(receiver.machine.device_id().to_owned(), BTreeMap::from([key]))]);
        let answer = claim_keys::v3::Response::new(BTreeMap::from([(receiver_id().to_owned(), of_device)]));
        self.machine.mark_request_as_sent(&id, &answer).await.unwrap();
    }

    /// Reads a message of the receiver, so that what is sent from now on are no pre-key messages.
    pub async fn greeted_by(&self, receiver: &Party) {
        let device = receiver.machine.get_device(self.machine.user_id(), self.machine.device_id(), None).await.unwrap();
        let message = device.unwrap().encrypt_event_raw("m.dummy", &json!({}), CollectStrategy::AllDevices).await.unwrap();
        let event = to_device(receiver_id(), message.json().get());
        receive(&self.machine, &sync_body("greeting", &[event], 50)).await;
    }

    /// Makes a session for the room, and gives the event by which the receiver gets its key, with the Olm message's type.
    pub async fn share(&self, room: &RoomId) -> (String, u64) {
        let settings = EncryptionSettings::default();
        let requests = self.machine.share_room_key(room, iter::once(receiver_id()), settings).await.unwrap();
        let mut shared = None;
        for request in &requests {
            for content in request.messages[receiver_id()].values() {
                let parsed: Value = serde_json::from_str(content.json().get()).unwrap();
                let message = parsed["ciphertext"].as_object().unwrap().values().next().unwrap();
                let kind = message["type"].as_u64().unwrap();
                shared = Some((to_device(self.machine.user_id(), content.json().get()), kind));
            }
            self.machine.mark_request_as_sent(&request.txn_id, &ToDeviceResponse::new()).await.unwrap();
        }
        shared.expect("the room key is shared with the receiver")
    }

    /// Encrypts a text of ordinary length for the room.
    pub async fn message(&self, room: &RoomId, number: usize) -> Raw<EncryptedEvent> {
        let body = format!("message {number} in room {room}, of ordinary length for a chat");
        let content: Raw<AnyMessageLikeEventContent> =
            Raw::from_json_string(json!({"msgtype": "m.text", "body": body}).to_string()).unwrap();
        let encrypted = self.machine.encrypt_room_event_raw(room, "m.room.message", &content).await.unwrap();
        let event = json!({
            "type": "m.room.encrypted", "event_id": format!("${room}{number}"), "room_id": room,
            "sender": self.machine.user_id(), "origin_server_ts": 1_700_000_000_000u64 + number as u64,
            "content": serde_json::from_str::<Value>(encrypted.content.json().get()).unwrap(),
        });
        Raw::from_json_string(event.to_string()).unwrap()
    }
}

fn to_device(sender: &UserId, content: &str) -> String {
    format!(r#"{{"type":"m.room.encrypted","sender":"{sender}","content":{content}}}"#)
}

/// The answer to a /sync that brings these to-device events.
pub fn sync_body(token: &str, to_device: &[String], one_time_keys: usize) -> Vec<u8> {
    let events = to_device.join(",");
    format!(
        r#"{{"next_batch":"{token}","device_one_time_keys_count":{{"signed_curve25519":{one_time_keys}}},"to_device":{{"events":[{events}]}}}}"#
    )
    .into_bytes()
}

/// Takes messages of whoever sent them: what they are worth is for others to judge.
pub fn settings() -> DecryptionSettings {
    DecryptionSettings { sender_device_trust_requirement: TrustRequirement::Untrusted }
}

/// Processes the answer to a /sync from its bytes on, and gives how many room keys it brought.
pub async fn receive(machine: &OlmMachine, body: &[u8]) -> usize {
    let answer = sync_events::v3::Response::try_from_http_response(http::Response::new(body)).unwrap();
    let changes = EncryptionSyncChanges {
        to_device_events: answer.to_device.events,
        changed_devices: &answer.device_lists,
        one_time_keys_counts: &answer.device_one_time_keys_count,
        unused_fallback_keys: None,
        next_batch_token: Some(answer.next_batch),
    };
    let (_, keys) = machine.receive_sync_changes(changes, &settings()).await.unwrap();
    keys.len()
}
