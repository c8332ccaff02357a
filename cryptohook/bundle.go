package cryptohook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// History that somebody gives who invites us: m.room_key_bundle (MSC4268).
// https://spec.matrix.org/unstable/client-server-api/#sharing-keys-with-new-room-members
//
// An inviter sends the address of a file with the keys of earlier messages, before the invitation. It is kept until the invitation comes
// and the inviter's device is proven, a day at most, then fetched and imported. What it says of who made the sessions is the inviter's
// word.
//
// The bundle's list of withheld sessions is left out. An entry says why the inviter does not give a key, not why its owner does not; as the
// owner's word it would end the search for the key, and be told to people as a reason that the owner never gave.

// The types of a bundle's event: the specification's, and the one that matrix-sdk-crypto sends until that is released.
const (
	bundleType         = "m.room_key_bundle"
	unstableBundleType = "io.element.msc4268.room_key_bundle"
)

const (
	// keepBundles is how long an inviter's bundle waits: for the invitation, for a proof, or for the server.
	keepBundles      = 24 * time.Hour
	bundlesPerSender = 10
	bundlesHeld      = 1000
	maxBundle        = 32 << 20 // bytes
	// maxBundleEvent is in bytes. The event holds an address and a key.
	maxBundleEvent = 16 << 10
	bundleTimeout  = 2 * time.Minute
)

// Faults of bundles. They are logged once each; the bundle is ignored.
var (
	errBundleUnsigned  = errors.New("the message lacks the sender's device keys")
	errBundleMalformed = errors.New("the bundle is not readable")
	errBundleTooBig    = errors.New("the bundle is too big")
	errBundleSender    = errors.New("the sender's device keys carry a forged signature")
	errNotShared       = fmt.Errorf("%w: its owner does not let it be shared", errBadExport)
)

// keyBundle is a bundle that waits to be fetched.
type keyBundle struct {
	roomID     id.RoomID
	sender     id.UserID
	senderKey  id.SenderKey
	signingKey id.Ed25519
	content    json.RawMessage
	deviceKeys json.RawMessage
	receivedAt time.Time
}

// keyBundles fetches bundles, beside everything else.
type keyBundles struct {
	hook *Hook
	wake chan struct{}
	// waiting says that there may be bundles.
	waiting atomic.Bool

	mu sync.Mutex
	// failed are the bundles that the server did not give.
	failed map[bundleKey]*attempt
}

type bundleKey struct {
	roomID id.RoomID
	sender id.UserID
}

func newKeyBundles(hook *Hook) *keyBundles {
	b := &keyBundles{hook: hook, wake: make(chan struct{}, 1), failed: make(map[bundleKey]*attempt)}
	b.waiting.Store(true)
	return b
}

// signal has the bundles looked at again: something about their senders or rooms may be known now.
func (b *keyBundles) signal() {
	if b.waiting.Load() {
		notify(b.wake)
	}
}

// receiveBundle keeps an m.room_key_bundle within the unit of work. Without the sender's device keys in the message, nothing in it counts.
func (h *Hook) receiveBundle(ctx context.Context, olmEvent *crypto.DecryptedOlmEvent) {
	bundle, err := parseBundle(olmEvent)
	if err != nil {
		zerolog.Ctx(ctx).Warn().Err(err).Msg("Ignoring a room key bundle")
		return
	}
	bundle.receivedAt = h.clock()
	h.bundles.waiting.Store(true)
	h.uow.stage(func(ctx context.Context) error { return h.store.putBundle(ctx, bundle) })
}

func parseBundle(olmEvent *crypto.DecryptedOlmEvent) (*keyBundle, error) {
	if olmEvent.SenderDeviceKeys == nil {
		return nil, errBundleUnsigned
	}
	if len(olmEvent.Content.VeryRaw) > maxBundleEvent {
		return nil, errBundleTooBig
	}
	content, err := parseBundleContent(olmEvent.Content.VeryRaw)
	if err != nil {
		return nil, err
	}
	deviceKeys, err := json.Marshal(olmEvent.SenderDeviceKeys)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBundleMalformed, err)
	}
	return &keyBundle{
		roomID: content.RoomID, sender: olmEvent.Sender, senderKey: olmEvent.SenderKey, signingKey: olmEvent.Keys.Ed25519,
		content: json.RawMessage(olmEvent.Content.VeryRaw), deviceKeys: deviceKeys,
	}, nil
}

func parseBundleContent(raw json.RawMessage) (*event.RoomKeyBundleEventContent, error) {
	var content event.RoomKeyBundleEventContent
	if err := json.Unmarshal(raw, &content); err != nil {
		return nil, fmt.Errorf("%w: %w", errBundleMalformed, err)
	}
	if address, err := content.File.URL.Parse(); err != nil || address.IsEmpty() || content.RoomID == "" {
		return nil, fmt.Errorf("%w: it lacks the room or the address of the file", errBundleMalformed)
	}
	if err := content.File.PrepareForDecryption(); err != nil {
		return nil, fmt.Errorf("%w: %w", errBundleMalformed, err)
	}
	return &content, nil
}

// noteInvite notes who invites us, in the unit of work.
func (h *Hook) noteInvite(_ context.Context, evt *event.Event) {
	if evt.Mautrix.EventSource&event.SourceInvite == 0 || evt.GetStateKey() != h.client.UserID.String() || membership(&evt.Content) != event.MembershipInvite {
		return
	}
	roomID, inviter, now := evt.RoomID, evt.Sender, h.clock()
	h.uow.stage(func(ctx context.Context) error { return h.store.putInvite(ctx, roomID, inviter, now) })
}

// run fetches bundles until the context ends.
func (b *keyBundles) run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := b.pass(ctx); err != nil && ctx.Err() == nil {
			b.hook.log.Err(err).Msg("Failed to look at the room key bundles, trying again")
		}
		timer := time.NewTimer(longestSleep)
		select {
		case <-ctx.Done():
		case <-b.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// pass fetches the bundles that can be fetched now. The error is the store's.
func (b *keyBundles) pass(ctx context.Context) error {
	if !b.waiting.Swap(false) {
		return nil
	}
	h, now := b.hook, b.hook.clock()
	ctx = h.log.With().Str("component", "room key bundles").Logger().WithContext(ctx)
	bundles, err := h.store.bundles(ctx, now.Add(-keepBundles))
	if err != nil {
		b.waiting.Store(true)
		return err
	}
	for _, bundle := range bundles {
		logger := zerolog.Ctx(ctx).With().Stringer("room_id", bundle.roomID).Stringer("sender", bundle.sender).Logger()
		done, err := b.take(logger.WithContext(ctx), bundle)
		if err != nil {
			b.waiting.Store(true)
			return err
		}
		if !done {
			b.waiting.Store(true)
			continue
		}
		if err = h.store.write(ctx, func(ctx context.Context) error { return h.store.deleteBundle(ctx, bundle) }); err != nil {
			return err
		}
	}
	return nil
}

// take fetches and imports one bundle if its sender has invited us to its room, is proven, and the server gives it. It says whether the
// bundle is done with.
func (b *keyBundles) take(ctx context.Context, bundle *keyBundle) (done bool, err error) {
	h, log := b.hook, zerolog.Ctx(ctx)
	key := bundleKey{bundle.roomID, bundle.sender}
	if !b.isDue(key) {
		return false, nil
	}
	if invited, err := h.joinedBy(ctx, bundle); err != nil || !invited {
		return false, err
	}
	state, err := h.stateOfBundle(ctx, bundle)
	switch {
	case err != nil:
		return false, err
	case state == StateRejected:
		log.Warn().Err(errBundleSender).Msg("Ignoring a room key bundle")
		return true, nil
	case state.rank() < StateSenderUnverified.rank():
		return false, nil
	}
	keys, err := h.downloadBundle(ctx, bundle)
	switch {
	case errors.Is(err, errBundleMalformed), errors.Is(err, errBundleTooBig), isGone(err):
		log.Warn().Err(err).Msg("Ignoring a room key bundle")
		return true, nil
	case err != nil:
		log.Warn().Err(err).Msg("Failed to fetch a room key bundle, trying again")
		b.failedOnce(key)
		return false, nil
	}
	return true, h.importBundle(ctx, bundle, keys)
}

func (b *keyBundles) isDue(key bundleKey) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	failed := b.failed[key]
	return failed == nil || !failed.next.After(b.hook.clock())
}

func (b *keyBundles) failedOnce(key bundleKey) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed[key] == nil {
		b.failed[key] = &attempt{}
	}
	failed := b.failed[key]
	failed.next = b.hook.clock().Add(min(firstBackoff<<min(failed.count, maxRetries), maxBackoff))
	failed.count++
}

// joinedBy says whether we are in the bundle's room since its sender has invited us. Nobody else can make us fetch anything.
func (h *Hook) joinedBy(ctx context.Context, bundle *keyBundle) (bool, error) {
	inviter, err := h.store.inviter(ctx, bundle.roomID, h.clock().Add(-keepBundles))
	return inviter == bundle.sender && h.client.StateStore.IsInRoom(ctx, bundle.roomID, h.client.UserID), err
}

// stateOfBundle walks the steps for the device that sent the bundle.
func (h *Hook) stateOfBundle(ctx context.Context, bundle *keyBundle) (State, error) {
	d := derivation{
		caches: h.store, anchor: h.anchor(), now: h.clock(), embedded: bundle.deviceKeys,
		data: SenderData{SenderKey: bundle.senderKey, SigningKey: bundle.signingKey, Sender: bundle.sender, Source: SourceDirect},
	}
	derived, err := d.derive(ctx)
	if err != nil {
		return "", err
	}
	if d.waits && d.asks {
		if current, err := h.store.deviceListCurrent(ctx, bundle.sender); err != nil {
			return "", err
		} else if !current && !h.resolver.pending(bundle.sender) {
			h.resolver.ask(bundle.sender)
		}
	}
	return derived.State, nil
}

// roomKeyBundle is the file. https://spec.matrix.org/unstable/client-server-api/#definition-roomkeybundle
type roomKeyBundle struct {
	RoomKeys []*crypto.ExportedSession `json:"room_keys"`
}

// downloadBundle fetches a bundle's file and decrypts it.
func (h *Hook) downloadBundle(ctx context.Context, bundle *keyBundle) (*roomKeyBundle, error) {
	content, err := parseBundleContent(bundle.content)
	if err != nil {
		return nil, err
	}
	address, err := content.File.URL.Parse()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBundleMalformed, err)
	}
	ctx, cancel := context.WithTimeout(ctx, bundleTimeout)
	defer cancel()
	resp, err := h.client.Download(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("failed to download the file: %w", err)
	}
	defer resp.Body.Close()
	file, err := io.ReadAll(io.LimitReader(resp.Body, maxBundle+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("failed to download the file: %w", err)
	case len(file) > maxBundle:
		return nil, errBundleTooBig
	}
	if err = content.File.DecryptInPlace(file); err != nil {
		return nil, fmt.Errorf("%w: %w", errBundleMalformed, err)
	}
	var keys roomKeyBundle
	if err = json.Unmarshal(file, &keys); err != nil {
		return nil, fmt.Errorf("%w: %w", errBundleMalformed, err)
	}
	return &keys, nil
}

// isGone says that a server will not give a file any more.
func isGone(err error) bool {
	var httpError mautrix.HTTPError
	return errors.As(err, &httpError) && (httpError.IsStatus(http.StatusNotFound) || httpError.IsStatus(http.StatusGone))
}

// importBundle imports the sessions of the bundle's room.
func (h *Hook) importBundle(ctx context.Context, bundle *keyBundle, keys *roomKeyBundle) error {
	var result ImportResult
	defer h.keysCame(&result)
	for _, exported := range keys.RoomKeys {
		session, err := bundle.parse(exported)
		if err == nil {
			err = h.importSession(ctx, session, &result)
		} else {
			result.Total++
			result.Refused++
		}
		switch {
		case isExportFault(err):
			zerolog.Ctx(ctx).Debug().Err(err).Msg("Skipping a session of a room key bundle")
		case err != nil:
			return err
		}
	}
	zerolog.Ctx(ctx).Info().Int("sessions", result.Total).Int("imported", result.Imported).Int("known", result.Known).
		Int("conflicting", result.Conflicting).Int("refused", result.Refused).Msg("Imported the history that an inviter has given")
	return nil
}

// parse makes one session of the bundle. Whose keys may not be shared are not taken, even if an inviter shares them.
func (b *keyBundle) parse(exported *crypto.ExportedSession) (*crypto.InboundGroupSession, error) {
	switch {
	case exported == nil:
		return nil, errClaimsNoOwner
	case exported.RoomID != b.roomID:
		return nil, errOtherRoom
	case exported.SharedHistory != nil && !*exported.SharedHistory:
		return nil, errNotShared
	}
	shared := true
	exported.SharedHistory = &shared
	return parseExport(exported, keySourceBundle, b.sender)
}

const getSourceUserQuery = `SELECT source_user FROM crypto_megolm_inbound_session WHERE account_id=$1 AND session_id=$2`

// nameSource puts into a verdict whose word it is that somebody sent the session.
func (h *Hook) nameSource(ctx context.Context, v *Verdict) error {
	if v.Source != SourceHistoryBundle {
		return nil
	}
	err := h.store.QueryRow(ctx, getSourceUserQuery, h.uow.AccountID, v.SessionID).Scan(&v.SourceUser)
	if err = ignoreNoRows(err); err != nil {
		return fmt.Errorf("failed to look up who gave a session: %w", err)
	}
	return nil
}

const (
	upsertBundleQuery = `
		INSERT INTO sendertrust_key_bundle (room_id, sender, sender_key, signing_key, content, device_keys, received_at_ms)
		VALUES ($1, $2, $3, $4, $5, $6, $7)
		ON CONFLICT (room_id, sender) DO UPDATE SET
			sender_key=excluded.sender_key, signing_key=excluded.signing_key, content=excluded.content,
			device_keys=excluded.device_keys, received_at_ms=excluded.received_at_ms
	`
	// Of one sender, and of all, only the newest are kept.
	trimBundlesOfQuery = `
		DELETE FROM sendertrust_key_bundle WHERE sender=$1 AND room_id NOT IN (
			SELECT room_id FROM sendertrust_key_bundle WHERE sender=$1 ORDER BY received_at_ms DESC, room_id DESC LIMIT $2
		)
	`
	trimBundlesQuery = `
		DELETE FROM sendertrust_key_bundle WHERE received_at_ms < (
			SELECT received_at_ms FROM sendertrust_key_bundle ORDER BY received_at_ms DESC LIMIT 1 OFFSET $1
		)
	`
	getBundlesQuery = `
		SELECT room_id, sender, sender_key, signing_key, content, device_keys, received_at_ms FROM sendertrust_key_bundle
		WHERE received_at_ms>=$1 ORDER BY received_at_ms
	`
	deleteBundleQuery = `DELETE FROM sendertrust_key_bundle WHERE room_id=$1 AND sender=$2 AND received_at_ms=$3`
	pruneBundlesQuery = `DELETE FROM sendertrust_key_bundle WHERE received_at_ms<$1`
	upsertInviteQuery = `
		INSERT INTO sendertrust_invite (room_id, inviter, invited_at_ms) VALUES ($1, $2, $3)
		ON CONFLICT (room_id) DO UPDATE SET inviter=excluded.inviter, invited_at_ms=excluded.invited_at_ms
	`
	getInvitesQuery   = `SELECT room_id, inviter FROM sendertrust_invite WHERE invited_at_ms>=$1 ORDER BY invited_at_ms`
	getInviterQuery   = `SELECT inviter FROM sendertrust_invite WHERE room_id=$1 AND invited_at_ms>=$2`
	pruneInvitesQuery = `DELETE FROM sendertrust_invite WHERE invited_at_ms<$1`
)

// putBundle keeps a bundle in the place of the sender's former one for the room, and forgets the oldest ones of who sends many.
func (s *store) putBundle(ctx context.Context, b *keyBundle) error {
	_, err := s.Exec(ctx, upsertBundleQuery,
		b.roomID, b.sender, b.senderKey, b.signingKey, string(b.content), string(b.deviceKeys), b.receivedAt.UnixMilli())
	if err != nil {
		return fmt.Errorf("failed to store a room key bundle: %w", err)
	}
	if _, err = s.Exec(ctx, trimBundlesOfQuery, b.sender, bundlesPerSender); err != nil {
		return err
	}
	if _, err = s.Exec(ctx, trimBundlesQuery, bundlesHeld-1); err != nil {
		return err
	}
	_, err = s.Exec(ctx, pruneBundlesQuery, b.receivedAt.Add(-keepBundles).UnixMilli())
	return err
}

// bundles gives the bundles that were received since.
func (s *store) bundles(ctx context.Context, since time.Time) ([]*keyBundle, error) {
	rows, err := s.Query(ctx, getBundlesQuery, since.UnixMilli())
	list, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (*keyBundle, error) {
		var b keyBundle
		var content, deviceKeys string
		var received int64
		err := row.Scan(&b.roomID, &b.sender, &b.senderKey, &b.signingKey, &content, &deviceKeys, &received)
		b.content, b.deviceKeys, b.receivedAt = json.RawMessage(content), json.RawMessage(deviceKeys), time.UnixMilli(received)
		return &b, err
	}, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the room key bundles: %w", err)
	}
	return list, nil
}

// deleteBundle forgets a bundle, unless another one has taken its place.
func (s *store) deleteBundle(ctx context.Context, b *keyBundle) error {
	_, err := s.Exec(ctx, deleteBundleQuery, b.roomID, b.sender, b.receivedAt.UnixMilli())
	return err
}

// putInvite notes who invites us, and forgets invitations that are too old to matter.
func (s *store) putInvite(ctx context.Context, roomID id.RoomID, inviter id.UserID, now time.Time) error {
	if _, err := s.Exec(ctx, upsertInviteQuery, roomID, inviter, now.UnixMilli()); err != nil {
		return fmt.Errorf("failed to store who has invited us: %w", err)
	}
	_, err := s.Exec(ctx, pruneInvitesQuery, now.Add(-keepBundles).UnixMilli())
	return err
}

// inviter gives who has invited us to the room since that time, or nobody.
func (s *store) inviter(ctx context.Context, roomID id.RoomID, since time.Time) (inviter id.UserID, err error) {
	err = s.QueryRow(ctx, getInviterQuery, roomID, since.UnixMilli()).Scan(&inviter)
	return inviter, ignoreNoRows(err)
}

// Invitation is that somebody has invited us to a room.
type Invitation struct {
	RoomID  id.RoomID
	Inviter id.UserID
}

// Invitations gives those of the last day that are neither accepted nor withdrawn, the oldest first.
func (h *Hook) Invitations(ctx context.Context) ([]Invitation, error) {
	rows, err := h.store.Query(ctx, getInvitesQuery, h.clock().Add(-keepBundles).UnixMilli())
	all, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (i Invitation, err error) {
		return i, row.Scan(&i.RoomID, &i.Inviter)
	}, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read who has invited us: %w", err)
	}
	return slices.DeleteFunc(all, func(i Invitation) bool {
		return !h.client.StateStore.IsMembership(ctx, i.RoomID, h.client.UserID, event.MembershipInvite)
	}), nil
}
