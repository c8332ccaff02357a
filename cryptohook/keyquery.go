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
	answered := make([]id.UserID, 0, len(answer.DeviceKeys))
	err = h.learn(context.WithoutCancel(ctx), func(ctx context.Context) error {
		answered = answered[:0]
		for _, user := range users {
			if !h.questions.answers(user.userID, number) {
				continue
			}
			if err := h.storePublished(ctx, user, &answer, len(asked.DeviceKeys[user.userID]) == 0); err != nil {
				return err
			}
			answered = append(answered, user.userID)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("failed to store the keys that users publish: %w", err)
	}
	faultpoint.Reach("learnt")
	h.resolver.judgeAgain(answered)
	h.bundles.signal()
	h.changed(Change{Users: answered})
	return body, nil
}

// storePublished stores one user's devices and identity, and judges the user's proven sessions by them. complete says that all
// devices were asked for.
func (h *Hook) storePublished(ctx context.Context, user *publishedUser, answer *keyQuery, complete bool) error {
	log := h.log.With().Stringer("user_id", user.userID).Logger()
	ctx = log.WithContext(ctx)
	if err := h.storeDevices(ctx, user, complete); err != nil {
		return err
	}
	anchor := h.anchor()
	if anchor.userSigningKey != user.userSigningKey {
		user.checkIdentity(anchor, answer)
	}
	if user.identityFault != nil {
		log.Warn().Err(user.identityFault).Msg("The server publishes a cross-signing key that is not valid")
	}
	identity, err := h.store.identity(ctx, user.userID)
	if err != nil || identity == nil && user.identity == nil {
		return err
	}
	if user.identity != nil {
		if identity, err = h.mergePublished(ctx, user.userID, identity, user.identity); err != nil {
			return err
		}
		if err = h.keepObjects(ctx, user.userID, answer, user.identity); err != nil {
			return err
		}
	}
	return h.store.rejudge(ctx, identity, anchor, h.clock())
}

// mergePublished stores what a user publishes as the identity; known is what was known before, or nil.
func (h *Hook) mergePublished(ctx context.Context, userID id.UserID, known *Identity, published *publishedIdentity) (*Identity, error) {
	log := zerolog.Ctx(ctx)
	identity := &Identity{UserID: userID}
	if known != nil {
		*identity = *known
	}
	withdrawn, err := h.store.isWithdrawn(ctx, userID, published.masterKey)
	if err != nil {
		return nil, fmt.Errorf("failed to look up whether a verification was withdrawn: %w", err)
	}
	identity.merge(published, withdrawn)
	identity.PinnedKey = h.options.VerifiedUsers[userID]
	if known != nil && known.MasterKey != identity.MasterKey {
		log.Warn().Stringer("old_master_key", known.MasterKey).Stringer("new_master_key", identity.MasterKey).
			Msg("The identity of this user has changed")
	}
	if identity.PinnedKey != "" && identity.PinnedKey != identity.MasterKey && (known == nil || *known != *identity) {
		log.Error().Stringer("pinned_master_key", identity.PinnedKey).Stringer("published_master_key", identity.MasterKey).
			Msg("The master key that this user publishes is NOT the one that the configuration pins: treating this user as a verification violation")
	}
	if known != nil && *known == *identity {
		return identity, nil
	}
	return identity, h.store.putIdentity(ctx, identity, h.clock())
}

// keepObjects keeps the cross-signing keys that a user publishes as they were signed. Those that are not valid are left out.
func (h *Hook) keepObjects(ctx context.Context, userID id.UserID, answer *keyQuery, published *publishedIdentity) error {
	key := identityKey{
		masterKey: published.masterKey, masterObject: answer.MasterKeys[userID], selfSigningKey: published.selfSigningKey, seenAt: h.clock(),
	}
	if key.selfSigningKey != "" {
		key.selfSigningObject = answer.SelfSigningKeys[userID]
	}
	return h.store.putIdentityKey(ctx, userID, key)
}

// storeDevices stores the devices that a user publishes, and notes who has signed them: also keys that nobody knows yet, since they may
// turn out to be the user's when the device is gone.
func (h *Hook) storeDevices(ctx context.Context, user *publishedUser, complete bool) error {
	var valid []*publishedDevice
	var kept []id.DeviceID
	for _, device := range user.devices {
		log := zerolog.Ctx(ctx).With().Stringer("device_id", device.deviceID).Logger()
		if device.fault != nil {
			log.Warn().Err(device.fault).Msg("The server publishes device keys that are not valid")
			continue
		}
		known, err := h.store.signingKey(ctx, user.userID, device.deviceID)
		if err != nil {
			return err
		}
		if known != "" && known != device.signingKey {
			log.Error().Err(errSigningKeyChanged).Msg("Ignoring a device's new keys")
			kept = append(kept, device.deviceID)
			continue
		}
		valid = append(valid, device)
	}
	if complete {
		if err := h.store.markDevicesDeleted(ctx, user.userID); err != nil {
			return err
		}
	}
	for _, deviceID := range kept {
		if err := h.store.keepDevice(ctx, user.userID, deviceID); err != nil {
			return err
		}
	}
	for _, device := range valid {
		if err := h.store.putDevice(ctx, user.userID, device.deviceID, device.identityKey, device.signingKey, device.raw); err != nil {
			return err
		}
		for _, signer := range device.signers {
			if _, err := h.store.putSignature(ctx, signature{user.userID, device.identityKey, device.signingKey, signer}, device.raw); err != nil {
				return err
			}
		}
	}
	return nil
}
