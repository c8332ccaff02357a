package cryptohook

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"

	"sendertrust/internal/faultpoint"
)

// keyQuery is a /keys/query answer with the objects as they were signed.
// https://spec.matrix.org/v1.16/client-server-api/#post_matrixclientv3keysquery
type keyQuery struct {
	DeviceKeys      map[id.UserID]map[id.DeviceID]json.RawMessage `json:"device_keys"`
	MasterKeys      map[id.UserID]json.RawMessage                 `json:"master_keys"`
	SelfSigningKeys map[id.UserID]json.RawMessage                 `json:"self_signing_keys"`
	// UserSigningKeys has our own only: nobody is shown another user's.
	UserSigningKeys map[id.UserID]json.RawMessage `json:"user_signing_keys"`
	// Failures are the homeservers that did not answer.
	Failures map[string]json.RawMessage `json:"failures"`
}

// keyQuestions are the key queries that are under way, whoever makes them. They overtake each other: an answer is older than one that
// has come before it if it was asked for earlier, and must not take its place.
type keyQuestions struct {
	mu sync.Mutex
	// last is the number of the last one that was begun.
	last  uint64
	asked int
	// newest is the number of the newest answer that has come for a user, since there was a time without any question.
	newest map[id.UserID]uint64
}

func (q *keyQuestions) begin() (number uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.last++
	q.asked++
	return q.last
}

func (q *keyQuestions) end() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.asked--; q.asked == 0 {
		clear(q.newest)
	}
}

// answers says whether there was no answer for the user yet to a later question.
func (q *keyQuestions) answers(userID id.UserID, number uint64) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.newest == nil {
		q.newest = make(map[id.UserID]uint64)
	}
	if q.newest[userID] > number {
		return false
	}
	q.newest[userID] = number
	return true
}

// questionIn reads whom a key query asks about; nil when that cannot be told.
func questionIn(req *http.Request) (*mautrix.ReqQueryKeys, error) {
	if req.GetBody == nil {
		return nil, nil
	}
	request, err := req.GetBody()
	if err != nil {
		return nil, err
	}
	var asked mautrix.ReqQueryKeys
	if err = json.NewDecoder(request).Decode(&asked); err != nil {
		return nil, fmt.Errorf("failed to read the key query's own request: %w", err)
	}
	return &asked, nil
}

// userFields are the fields of an answer that are by user.
var userFields = []string{"device_keys", "master_keys", "self_signing_keys", "user_signing_keys"}

// hasUnasked says that somebody is in the answer whom the query did not ask about.
func (k *keyQuery) hasUnasked(asked *mautrix.ReqQueryKeys) bool {
	return anybodyElse(k.DeviceKeys, asked) || anybodyElse(k.MasterKeys, asked) ||
		anybodyElse(k.SelfSigningKeys, asked) || anybodyElse(k.UserSigningKeys, asked)
}

func anybodyElse[V any](users map[id.UserID]V, asked *mautrix.ReqQueryKeys) bool {
	for userID := range users {
		if _, wanted := asked.DeviceKeys[userID]; !wanted {
			return true
		}
	}
	return false
}

// withoutUnasked leaves those out of an answer whom the query did not ask about. mautrix would take them in: a server could have us
// encrypt to other devices of a user than those that we asked for.
func withoutUnasked(asked *mautrix.ReqQueryKeys, body []byte) ([]byte, error) {
	var answer map[string]json.RawMessage
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, err
	}
	for field, value := range answer {
		if !slices.ContainsFunc(userFields, func(name string) bool { return strings.EqualFold(name, field) }) { // as encoding/json finds it
			continue
		}
		var users map[id.UserID]json.RawMessage
		if err := json.Unmarshal(value, &users); err != nil {
			return nil, err
		}
		maps.DeleteFunc(users, func(userID id.UserID, _ json.RawMessage) bool {
			_, wanted := asked.DeviceKeys[userID]
			return !wanted
		})
		left, err := json.Marshal(users)
		if err != nil {
			return nil, err
		}
		answer[field] = left
	}
	return json.Marshal(answer)
}

// observeKeyQuery stores what a /keys/query answer proves, and gives what mautrix is to see of it. Users that were not asked about are
// left out. An unreadable answer is left to mautrix to complain about.
func (h *Hook) observeKeyQuery(req *http.Request, number uint64, body []byte) (forMautrix []byte, err error) {
	ctx := req.Context()
	asked, err := questionIn(req)
	if err != nil || asked == nil {
		return body, err
	}
	var answer keyQuery
	if json.Unmarshal(body, &answer) != nil {
		return body, nil
	}
	if answer.hasUnasked(asked) {
		zerolog.Ctx(ctx).Warn().Msg("Leaving out of a key query's answer whom nobody has asked about")
		if body, err = withoutUnasked(asked, body); err != nil {
			return nil, fmt.Errorf("failed to leave out whom nobody has asked about: %w", err)
		}
		// Of a field that is there twice mautrix is now to see the same as we.
		answer = keyQuery{}
		if err = json.Unmarshal(body, &answer); err != nil {
			return nil, fmt.Errorf("failed to read what is left of an answer: %w", err)
		}
	}
	h.observeOwn(asked, number, &answer)
	users, err := h.checkPublished(ctx, asked, &answer)
	if err != nil {
		return nil, fmt.Errorf("failed to check the keys that users publish: %w", err)
	}
	var answered []id.UserID
	took := takenIn(ctx)
	err = h.learn(context.WithoutCancel(ctx), func(ctx context.Context) error {
		current := slices.DeleteFunc(slices.Clone(users), func(user *publishedUser) bool { return !h.questions.answers(user.userID, number) })
		answered = make([]id.UserID, len(current))
		for i, user := range current {
			answered[i] = user.userID
		}
		if err := h.storePublished(ctx, current, &answer); err != nil || took == nil {
			return err
		}
		return h.storeForMautrix(ctx, current, &answer)
	})
	if err != nil {
		return nil, fmt.Errorf("failed to store the keys that users publish: %w", err)
	}
	faultpoint.Reach("learnt")
	h.resolver.judgeAgain(answered)
	h.bundles.signal()
	h.changed(Change{Users: answered})
	if took != nil {
		return took.done(users, &answer)
	}
	return body, nil
}

// storePublished stores users' devices and identities, and judges the users' proven sessions by them. It takes a few statements for all of
// them, not some for each. Users whom the database takes for the same come one after the other.
func (h *Hook) storePublished(ctx context.Context, users []*publishedUser, answer *keyQuery) error {
	for some := range apart(users, perStatement, func(user *publishedUser) id.UserID { return stored(h.store.Database, user.userID) }) {
		if err := h.storeUsers(ctx, some, answer); err != nil {
			return err
		}
	}
	return nil
}

func (h *Hook) storeUsers(ctx context.Context, users []*publishedUser, answer *keyQuery) error {
	userIDs := make([]id.UserID, len(users))
	for i, user := range users {
		userIDs[i] = user.userID
	}
	if err := h.storeDevices(ctx, users, userIDs); err != nil {
		return err
	}
	anchor := h.anchor()
	identities, err := h.storeIdentities(ctx, users, userIDs, answer, anchor)
	if err != nil || len(identities) == 0 {
		return err
	}
	return h.store.rejudgeAll(ctx, identities, anchor, h.clock())
}

// storeIdentities stores what users publish as their identities, with the objects, and gives the identities that they have now.
func (h *Hook) storeIdentities(ctx context.Context, users []*publishedUser, userIDs []id.UserID, answer *keyQuery, anchor trustAnchor) ([]*Identity, error) {
	known, err := h.store.identities(ctx, userIDs)
	if err != nil {
		return nil, err
	}
	withdrawn, err := h.store.withdrawals(ctx, userIDs)
	if err != nil {
		return nil, err
	}
	var now, changed []*Identity
	var keys []identityKey
	for _, user := range users {
		if anchor.userSigningKey != user.userSigningKey {
			user.checkIdentity(anchor, answer)
		}
		if user.identityFault != nil {
			h.log.Warn().Stringer("user_id", user.userID).Err(user.identityFault).Msg("The server publishes a cross-signing key that is not valid")
		}
		storedID := stored(h.store.Database, user.userID)
		former := known[storedID]
		if user.identity == nil {
			if former != nil {
				now = append(now, former)
			}
			continue
		}
		identity := h.mergePublished(user, former, withdrawn[withdrawal{storedID, user.identity.masterKey}])
		if former == nil || *former != *identity {
			changed = append(changed, identity)
		}
		now, keys = append(now, identity), append(keys, h.publishedObjects(user, answer))
	}
	if err = h.store.putIdentities(ctx, changed, h.clock()); err != nil {
		return nil, err
	}
	return now, h.store.putIdentityKeys(ctx, keys)
}

// mergePublished gives the identity that a user has after what was published; known is what was known before, or nil.
func (h *Hook) mergePublished(user *publishedUser, known *Identity, withdrawn bool) *Identity {
	log := h.log.With().Stringer("user_id", user.userID).Logger()
	identity := &Identity{UserID: user.userID}
	if known != nil {
		*identity = *known
	}
	identity.merge(user.identity, withdrawn)
	identity.PinnedKey = h.options.VerifiedUsers[user.userID]
	if known != nil && known.MasterKey != identity.MasterKey {
		log.Warn().Stringer("old_master_key", known.MasterKey).Stringer("new_master_key", identity.MasterKey).
			Msg("The identity of this user has changed")
	}
	if identity.PinnedKey != "" && identity.PinnedKey != identity.MasterKey && (known == nil || *known != *identity) {
		log.Error().Stringer("pinned_master_key", identity.PinnedKey).Stringer("published_master_key", identity.MasterKey).
			Msg("The master key that this user publishes is NOT the one that the configuration pins: treating this user as a verification violation")
	}
	return identity
}

// publishedObjects gives the cross-signing keys that a user publishes as they were signed. Those that are not valid are left out.
func (h *Hook) publishedObjects(user *publishedUser, answer *keyQuery) identityKey {
	key := identityKey{
		userID: user.userID, masterKey: user.identity.masterKey, masterObject: answer.MasterKeys[user.userID],
		selfSigningKey: user.identity.selfSigningKey, seenAt: h.clock(),
	}
	if key.selfSigningKey != "" {
		key.selfSigningObject = answer.SelfSigningKeys[user.userID]
	}
	return key
}

// storeDevices stores the devices that users publish, and notes who has signed them: also keys that nobody knows yet, since they may
// turn out to be the user's when the device is gone.
func (h *Hook) storeDevices(ctx context.Context, users []*publishedUser, userIDs []id.UserID) error {
	known, err := h.store.signingKeys(ctx, userIDs)
	if err != nil {
		return err
	}
	var complete []id.UserID
	var valid, kept []*publishedDevice
	for _, user := range users {
		if user.complete {
			complete = append(complete, user.userID)
		}
		for _, device := range user.devices {
			log := h.log.With().Stringer("user_id", device.userID).Stringer("device_id", device.deviceID).Logger()
			former := known[h.store.storedDevice(device.userID, device.deviceID)]
			switch {
			case device.fault != nil:
				log.Warn().Err(device.fault).Msg("The server publishes device keys that are not valid")
			case former != "" && former != device.signingKey:
				log.Error().Err(errSigningKeyChanged).Msg("Ignoring a device's new keys")
				kept = append(kept, device)
			default:
				valid = append(valid, device)
			}
		}
	}
	if err = h.store.markDevicesDeleted(ctx, complete); err != nil {
		return err
	}
	for _, device := range kept {
		if err = h.store.keepDevice(ctx, device.userID, device.deviceID); err != nil {
			return err
		}
	}
	if err = h.store.putDevices(ctx, valid); err != nil {
		return err
	}
	return h.store.putSignatures(ctx, signaturesOn(valid))
}

// signaturesOn gives the signatures on devices that are to be noted.
func signaturesOn(devices []*publishedDevice) (rows []signatureRow) {
	for _, device := range devices {
		for _, signer := range device.signers {
			rows = append(rows, signatureRow{signature{device.userID, device.identityKey, device.signingKey, signer}, device.raw})
		}
	}
	return rows
}
