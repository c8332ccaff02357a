// One device of one Matrix user with Element's own crypto (matrix-js-sdk, matrix-sdk-crypto), driven by lines of JSON:
// {"id":1,"method":"send","params":{…}} on standard input is answered by {"id":1,"result":…} or {"id":1,"error":"…"} on standard
// output, in the order in which things get done. It ends when standard input does. What the SDK logs goes to standard error, from
// the level in ELEMENT_LOG_LEVEL (trace, debug, info, warn, error; default warn).

import { Console } from "node:console";
import { createInterface } from "node:readline";

// Node 20 lacks this, and the SDK's sync hangs without it.
Promise.withResolvers ??= function () {
    const deferred = {};
    deferred.promise = new this((resolve, reject) => Object.assign(deferred, { resolve, reject }));
    return deferred;
};

const levels = ["trace", "debug", "info", "warn", "error"];
const firstLevel = levels.indexOf(process.env.ELEMENT_LOG_LEVEL ?? "warn");
const stderr = new Console(process.stderr, process.stderr);
const makeLogger = (prefix) => ({
    ...Object.fromEntries(
        levels.map((level, i) => [level, i < firstLevel ? () => {} : (...args) => stderr.log(level, prefix, ...args)]),
    ),
    getChild: (name) => makeLogger(prefix + name),
});
const logger = makeLogger("");
// Parts of the SDK log to the console directly, which would disturb the protocol.
Object.assign(console, logger, { log: logger.debug });
process.on("unhandledRejection", (reason) => logger.warn("unhandled rejection:", reason));

const sdk = await import("matrix-js-sdk");
const wasm = await import("@matrix-org/matrix-sdk-crypto-wasm");
const { EventShieldColour, EventShieldReason, decodeRecoveryKey } = await import("matrix-js-sdk/lib/crypto-api/index.js");

const annotationKey = "dev.sendertrust.annotation";
const defaultTimeout = 60_000;

let client;
/** The key of the account's secret storage, once this device has made one. */
let recoveryKey;
/** All events of all rooms that came by sync or were sent here, in that order. */
const timeline = [];

// Waiting: every change that the SDK tells of makes all waits look again.

let change = Promise.withResolvers();
function changed() {
    change.resolve();
    change = Promise.withResolvers();
}

/** Waits until check gives something, and returns it. */
async function until(check, timeout = defaultTimeout, what) {
    const expired = Promise.withResolvers();
    const timer = setTimeout(() => expired.resolve(true), timeout);
    try {
        for (;;) {
            const next = change.promise;
            const found = await check();
            if (found) return found;
            if (await Promise.race([next, expired.promise])) {
                throw new Error(`waited ${timeout} ms in vain until ${typeof what === "function" ? what() : what}`);
            }
        }
    } finally {
        clearTimeout(timer);
    }
}

// The crypto of the SDK.

const crypto = () => client.getCrypto();
const machine = () => crypto().getOlmMachineOrThrow();
const sendRequest = (request) => crypto().outgoingRequestProcessor.makeOutgoingRequest(request);

/** The public master key in an identity, base64 unpadded. */
const masterKeyOf = (identity) => Object.values(JSON.parse(identity.masterKey).keys)[0];

/** Asks the homeserver for the keys of a user, and gives the identity, if there is one. */
async function queryIdentity(user) {
    await machine().updateTrackedUsers([new wasm.UserId(user)]);
    await sendRequest(machine().queryKeysForUsers([new wasm.UserId(user)]));
    return machine().getIdentity(new wasm.UserId(user));
}

async function ownMasterKey() {
    const identity = await queryIdentity(client.getUserId());
    if (!identity?.isVerified()) throw new Error("the account's identity on the homeserver is not the one made here");
    return masterKeyOf(identity);
}

/** Makes the SDK's authentication callback, which answers with the password when it is asked for it. */
const authenticate = (password) => async (makeRequest) => {
    try {
        return await makeRequest(null);
    } catch (error) {
        if (error.httpStatus !== 401 || !error.data?.session) throw error;
        return await makeRequest({
            type: "m.login.password",
            identifier: { type: "m.id.user", user: client.getUserId() },
            password,
            session: error.data.session,
        });
    }
};

const wasmColours = {
    [wasm.ShieldColor.None]: EventShieldColour.NONE,
    [wasm.ShieldColor.Grey]: EventShieldColour.GREY,
    [wasm.ShieldColor.Red]: EventShieldColour.RED,
};
const wasmReasons = {
    [wasm.ShieldStateCode.AuthenticityNotGuaranteed]: EventShieldReason.AUTHENTICITY_NOT_GUARANTEED,
    [wasm.ShieldStateCode.UnknownDevice]: EventShieldReason.UNKNOWN_DEVICE,
    [wasm.ShieldStateCode.UnsignedDevice]: EventShieldReason.UNSIGNED_DEVICE,
    [wasm.ShieldStateCode.UnverifiedIdentity]: EventShieldReason.UNVERIFIED_IDENTITY,
    [wasm.ShieldStateCode.VerificationViolation]: EventShieldReason.VERIFICATION_VIOLATION,
    [wasm.ShieldStateCode.MismatchedSender]: EventShieldReason.MISMATCHED_SENDER,
};

/** A shield with the SDK's numbers, and their names in lower case. */
const shield = (colour, reason) => ({
    shieldColour: colour,
    shieldReason: reason,
    colour: EventShieldColour[colour].toLowerCase(),
    reason: reason === null ? "" : EventShieldReason[reason].toLowerCase(),
});

/** What Element shows beside an event: the SDK's verdict, which is lax, and the strict one. Null if it was not decrypted. */
async function shields(event) {
    const info = await crypto().getEncryptionInfoForEvent(event);
    if (!info) return { lax: null, strict: null };
    const lax = shield(info.shieldColour, info.shieldReason);
    // What this device sent itself is not known to the machine before it comes back by sync.
    if (event.status !== null) return { lax, strict: lax };
    const wire = {
        event_id: event.getId(),
        type: event.getWireType(),
        sender: event.getSender(),
        state_key: event.getStateKey(),
        content: event.getWireContent(),
        origin_server_ts: event.getTs(),
    };
    const whole = await machine().getRoomEventEncryptionInfo(JSON.stringify(wire), new wasm.RoomId(event.getRoomId()));
    const state = whole.shieldState(true);
    return { lax, strict: shield(wasmColours[state.color], wasmReasons[state.code] ?? null) };
}

// Events.

/** An event as it was sent: later edits are events of their own. */
async function describe(event) {
    return {
        event_id: event.getId(),
        room_id: event.getRoomId(),
        sender: event.getSender(),
        type: event.getType(),
        content: event.getOriginalContent(),
        encrypted: event.isEncrypted(),
        failure: event.isDecryptionFailure() ? event.decryptionFailureReason : "",
        encryption_info: (await shields(event)).lax,
    };
}

const eventByID = (id) => timeline.find((event) => event.getId() === id);
const readable = (event) => event && !event.isDecryptionFailure() && (!event.isEncrypted() || event.getClearContent());
const annotates = (event, id) => {
    const content = event.getOriginalContent();
    return [content, content["m.new_content"]].some((part) => part?.[annotationKey]?.event_id === id);
};
/** Says of an event that was waited for in vain what is wrong with it. */
const why = (id) => {
    const event = eventByID(id);
    if (!event) return "it has not come";
    return event.isDecryptionFailure() ? `it cannot be decrypted: ${event.decryptionFailureReason}` : "it has come, and is readable";
};

const isEncrypted = (room) => crypto().isEncryptionEnabledInRoom(room);
const memberJoined = (room, user) => client.getRoom(room)?.getMember(user)?.membership === "join";

/** Waits until a room is known here, and, when it is an encrypted one, as such: before that, the SDK would send in the clear. */
async function roomReady(room, timeout) {
    await until(() => client.getRoom(room)?.getMyMembership() === "join", timeout, `the room ${room} is synced`);
    const encryption = await client.getStateEvent(room, "m.room.encryption", "").catch((error) => {
        if (error.errcode !== "M_NOT_FOUND") throw error;
    });
    if (encryption) await methods.waitForEncryption({ room, timeout_ms: timeout });
}

// Verification. A request is known by its transaction ID: in a room, the ID of the event that made it.

const verificationRequests = new Map();
const verifierStates = new Map();

function noteRequest(request) {
    if (!verificationRequests.has(request.transactionId)) {
        verificationRequests.set(request.transactionId, request);
        request.on("change", changed);
    }
    changed();
    return { transaction_id: request.transactionId };
}

function requestOf(id) {
    const request = verificationRequests.get(id);
    if (!request) throw new Error(`there is no verification ${id}`);
    return request;
}

/** Has the verifier of a request take part, once, and gives what is known of it. */
function takePart(id, verifier) {
    if (verifierStates.has(id)) return verifierStates.get(id);
    const state = { verifier, sas: verifier.getShowSasCallbacks() };
    verifierStates.set(id, state);
    verifier.on("show_sas", (sas) => {
        state.sas = sas;
        changed();
    });
    verifier.verify().then(changed, (error) => {
        state.error = String(error);
        changed();
    });
    return state;
}

const phaseNames = ["", "unsent", "requested", "ready", "started", "cancelled", "done"];
/** The phase of a request. The SDK throws while it goes from one to the next. */
const phaseOf = (request) => {
    try {
        return phaseNames[request.phase];
    } catch {
        return "";
    }
};
const verifierOf = (request) => (phaseOf(request) === "started" ? request.verifier : undefined);
const ended = (request) => ["cancelled", "done"].includes(phaseOf(request));

const describeRequest = (request) => ({
    transaction_id: request.transactionId,
    user_id: request.otherUserId,
    device_id: request.otherDeviceId ?? "",
    phase: phaseOf(request),
    method: request.chosenMethod ?? "",
    cancel_code: request.cancellationCode ?? "",
    cancelled_by: request.cancellingUserId ?? "",
});

const methods = {
    async requestVerification({ user, room, device }) {
        await queryIdentity(user);
        return noteRequest(
            room ? await crypto().requestVerificationDM(user, room) : await crypto().requestDeviceVerification(user, device),
        );
    },

    async waitForVerification({ user, timeout_ms }) {
        const found = () => [...verificationRequests.values()].find((request) => request.otherUserId === user && !ended(request));
        return describeRequest(await until(found, timeout_ms, `${user} asks to verify`));
    },

    async waitForPhase({ verification, phases, timeout_ms }) {
        const request = requestOf(verification);
        const reached = () => phases.includes(phaseOf(request)) || ended(request);
        await until(reached, timeout_ms, () => `the verification is ${phases}; it is ${phaseOf(request)}`);
        return describeRequest(request);
    },

    async setVerificationMethods({ methods }) {
        crypto().setSupportedVerificationMethods(methods);
        return {};
    },

    async acceptVerification({ verification }) {
        const request = requestOf(verification);
        await queryIdentity(request.otherUserId);
        await request.accept();
        return {};
    },

    async startSAS({ verification }) {
        takePart(verification, await requestOf(verification).startVerification("m.sas.v1"));
        return {};
    },

    async emojis({ verification, timeout_ms }) {
        const request = requestOf(verification);
        const shown = () => {
            if (ended(request)) throw new Error(`the verification has ended: ${JSON.stringify(describeRequest(request))}`);
            const verifier = verifierOf(request);
            return verifier && takePart(verification, verifier).sas;
        };
        const { sas } = await until(shown, timeout_ms, () => `emojis are shown; the phase is ${phaseOf(request)}`);
        return {
            emojis: (sas.emoji ?? []).map(([symbol]) => symbol),
            names: (sas.emoji ?? []).map(([, name]) => name),
            numbers: sas.decimal ?? [],
        };
    },

    async confirmEmojis({ verification }) {
        await verifierStates.get(verification).sas.confirm();
        return {};
    },

    async denyEmojis({ verification }) {
        verifierStates.get(verification).sas.mismatch();
        return {};
    },

    async cancelVerification({ verification }) {
        await requestOf(verification).cancel();
        return {};
    },

    async scanQRCode({ verification, data }) {
        const bytes = new Uint8ClampedArray(Buffer.from(data, "base64"));
        takePart(verification, await requestOf(verification).scanQRCode(bytes));
        return {};
    },

    async verificationStatus({ user }) {
        await queryIdentity(user);
        const status = await crypto().getUserVerificationStatus(user);
        return { verified: status.isCrossSigningVerified(), was_verified: status.wasCrossSigningVerified() };
    },

    async waitVerified({ user, timeout_ms }) {
        const verified = async () => (await crypto().getUserVerificationStatus(user)).isCrossSigningVerified();
        await queryIdentity(user);
        await until(verified, timeout_ms, `${user} is verified`);
        return {};
    },

    async login({ homeserver, user, password, timeout_ms }) {
        if (client) throw new Error("one process is one device: it is logged in already");
        const session = await sdk.createClient({ baseUrl: homeserver, logger }).loginRequest({
            type: "m.login.password",
            identifier: { type: "m.id.user", user },
            password,
            initial_device_display_name: "Element's crypto",
        });
        client = sdk.createClient({
            baseUrl: homeserver,
            userId: session.user_id,
            deviceId: session.device_id,
            accessToken: session.access_token,
            cryptoCallbacks: {
                getSecretStorageKey: async ({ keys }) => [Object.keys(keys)[0], recoveryKey.privateKey],
            },
            logger,
        });
        await client.initRustCrypto({ useIndexedDB: false });
        let prepared = false;
        client.on(sdk.ClientEvent.Sync, (state) => {
            prepared ||= state === "PREPARED";
            changed();
        });
        client.on(sdk.RoomEvent.Timeline, (event) => {
            timeline.push(event);
            client.decryptEventIfNeeded(event).then(changed, (error) => logger.warn("cannot decrypt:", error));
        });
        client.on("crypto.verificationRequestReceived", noteRequest);
        client.on(sdk.MatrixEventEvent.Decrypted, changed);
        client.on(sdk.RoomEvent.LocalEchoUpdated, changed);
        client.on(sdk.RoomStateEvent.Events, changed);
        await client.startClient({ initialSyncLimit: 200, disablePresence: true });
        await until(() => prepared, timeout_ms, "the first sync is done");
        // Only then does the SDK publish the device's keys; without them nobody could send to it.
        await crypto().outgoingRequestsManager.doProcessOutgoingRequests();
        return { user_id: session.user_id, device_id: session.device_id, access_token: session.access_token };
    },

    async bootstrapCrossSigning({ password }) {
        await crypto().bootstrapCrossSigning({ authUploadDeviceSigningKeys: authenticate(password) });
        return { master_key: await ownMasterKey() };
    },

    async resetIdentity({ password }) {
        await crypto().bootstrapCrossSigning({
            setupNewCrossSigning: true,
            authUploadDeviceSigningKeys: authenticate(password),
        });
        return { master_key: await ownMasterKey() };
    },

    async setUpRecovery({ password, backup }) {
        recoveryKey = await crypto().createRecoveryKeyFromPassphrase();
        await crypto().bootstrapCrossSigning({ authUploadDeviceSigningKeys: authenticate(password) });
        await crypto().bootstrapSecretStorage({
            createSecretStorageKey: async () => recoveryKey,
            setupNewSecretStorage: true,
            setupNewKeyBackup: backup,
        });
        return { master_key: await ownMasterKey(), recovery_key: recoveryKey.encodedPrivateKey };
    },

    async useRecovery({ password, recovery_key }) {
        recoveryKey = { privateKey: decodeRecoveryKey(recovery_key) };
        await crypto().bootstrapCrossSigning({ authUploadDeviceSigningKeys: authenticate(password) });
        await crypto().loadSessionBackupPrivateKeyFromSecretStorage();
        await crypto().checkKeyBackupAndEnable();
        return { master_key: await ownMasterKey() };
    },

    async keyBackup() {
        const newest = await crypto().getKeyBackupInfo();
        if (!newest) return { version: "", trusted: false, matches_key: false, active: "" };
        const { trusted, matchesDecryptionKey } = await crypto().isKeyBackupTrusted(newest);
        const active = (await crypto().getActiveSessionBackupVersion()) ?? "";
        return { version: newest.version, trusted, matches_key: matchesDecryptionKey, active };
    },

    async invite({ room, user, share_history }) {
        await client.invite(room, user, { shareEncryptedHistory: share_history });
        return {};
    },

    async masterKey({ user }) {
        const identity = await queryIdentity(user);
        if (!identity) throw new Error(`${user} has no cross-signing identity`);
        return { master_key: masterKeyOf(identity) };
    },

    async verifyUser({ user }) {
        const identity = await queryIdentity(user);
        if (!identity) throw new Error(`${user} has no cross-signing identity`);
        await sendRequest(await identity.verify());
        const verified = await queryIdentity(user);
        if (!verified?.isVerified()) throw new Error(`${user} was signed, but does not count as verified`);
        return { master_key: masterKeyOf(verified) };
    },

    async learn({ user }) {
        const identity = await queryIdentity(user);
        return { master_key: identity ? masterKeyOf(identity) : "" };
    },

    async needsApproval({ user }) {
        return { needs_approval: (await crypto().getUserVerificationStatus(user)).needsUserApproval };
    },

    async withdrawVerification({ user }) {
        await crypto().withdrawVerificationRequirement(user);
        return {};
    },

    async createRoom({ encrypted, invite, name, timeout_ms }) {
        const { room_id } = await client.createRoom({
            preset: "private_chat",
            name,
            invite,
            initial_state: encrypted
                ? [{ type: "m.room.encryption", state_key: "", content: { algorithm: "m.megolm.v1.aes-sha2" } }]
                : [],
        });
        await roomReady(room_id, timeout_ms);
        return { room_id };
    },

    async join({ room, invited, timeout_ms }) {
        // The SDK takes the keys that come with an invitation only when it knows of the invitation.
        const known = () => client.getRoom(room)?.getMyMembership() === "invite";
        if (invited) await until(known, timeout_ms, `the invitation to ${room} comes`);
        await client.joinRoom(room);
        await roomReady(room, timeout_ms);
        return {};
    },

    async waitForEncryption({ room, timeout_ms }) {
        await until(() => isEncrypted(room), timeout_ms, `${room} is known to be encrypted`);
        return {};
    },

    async waitForMember({ room, user, timeout_ms }) {
        await until(() => memberJoined(room, user), timeout_ms, `${user} has joined ${room}`);
        return {};
    },

    async send({ room, body, thread, encrypted, timeout_ms }) {
        const content = { msgtype: "m.text", body };
        if (thread) {
            content["m.relates_to"] = {
                "rel_type": "m.thread",
                "event_id": thread,
                "is_falling_back": true,
                "m.in_reply_to": { event_id: thread },
            };
        }
        if (encrypted) await methods.waitForEncryption({ room, timeout_ms });
        return methods.sendRaw({ room, type: "m.room.message", content });
    },

    async sendRaw({ room, type, content }) {
        const { event_id } = await client.sendEvent(room, type, content);
        return { event_id };
    },

    async forceDiscardSession({ room }) {
        await crypto().forceDiscardSession(room);
        return {};
    },

    async setBlacklistUnverified({ value }) {
        crypto().globalBlacklistUnverifiedDevices = value;
        return {};
    },

    async events({ room }) {
        return Promise.all(timeline.filter((event) => event.getRoomId() === room).map(describe));
    },

    async waitForEvent({ event_id, timeout_ms }) {
        const found = () => (readable(eventByID(event_id)) ? eventByID(event_id) : null);
        return describe(await until(found, timeout_ms, () => `${event_id} can be read; ${why(event_id)}`));
    },

    async waitForUndecryptable({ event_id, timeout_ms }) {
        const found = () => (eventByID(event_id)?.isDecryptionFailure() ? eventByID(event_id) : null);
        return describe(await until(found, timeout_ms, () => `${event_id} fails to decrypt; ${why(event_id)}`));
    },

    async waitForReply({ event_id, timeout_ms }) {
        const found = () => timeline.find((event) => readable(event) && annotates(event, event_id));
        return describe(await until(found, timeout_ms, `an answer to ${event_id} comes`));
    },

    async waitForMessage({ room, sender, msgtype, timeout_ms }) {
        const fits = (event) =>
            event.getRoomId() === room && event.getSender() === sender && readable(event) && event.getOriginalContent().msgtype === msgtype;
        return describe(await until(() => timeline.find(fits), timeout_ms, `${sender} sends an ${msgtype}`));
    },

    async shield({ event_id, timeout_ms }) {
        await methods.waitForEvent({ event_id, timeout_ms });
        return shields(eventByID(event_id));
    },

    async look({ event_id, timeout_ms }) {
        const found = () => {
            const event = eventByID(event_id);
            return readable(event) || event?.isDecryptionFailure() ? event : null;
        };
        const event = await until(found, timeout_ms, () => `${event_id} comes; ${why(event_id)}`);
        const failure = event.isDecryptionFailure() ? event.decryptionFailureReason : "";
        return { failure, ...(await shields(event)) };
    },

    async logout() {
        await client.logout(true);
        return {};
    },

    async close() {
        return {};
    },
};

function answer(message) {
    process.stdout.write(JSON.stringify(message) + "\n");
}

async function serve(line) {
    let id = 0;
    try {
        const request = JSON.parse(line);
        id = request.id;
        const method = Object.hasOwn(methods, request.method) ? methods[request.method] : null;
        if (!method) throw new Error(`there is no method ${request.method}`);
        if (!client && request.method !== "login" && request.method !== "close") throw new Error("not logged in");
        answer({ id, result: await method(request.params ?? {}) });
        if (request.method === "close") process.exit(0);
    } catch (error) {
        logger.debug(error);
        answer({ id, error: error instanceof Error ? error.message : String(error) });
    }
}

const lines = createInterface({ input: process.stdin });
lines.on("line", (line) => void serve(line));
// The SDK's timers would keep the process alive.
lines.on("close", () => process.exit(0));
